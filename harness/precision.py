"""fp32 without TF32."""

import contextlib

import torch


@contextlib.contextmanager
def full_fp32():
    """Disables TF32 in the block, for matrix products and convolutions.

    On a GPU, cuDNN uses TF32 (10 bits of mantissa) by default, and so do matrix products if
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some container images set.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
