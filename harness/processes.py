"""torchrun's processes: joining their group, running rank 0 first, choosing device and precision."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness.errors import UserError, one_line


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins torchrun's process group, or a group of one, for the block; yields this process's device.

    Raises:
        UserError: there are more processes than GPUs on this node, or the nodes cannot reach each other.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs of this node")
        torch.cuda.set_device(device)
    store, rank, processes = dist.HashStore(), 0, 1
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ:
        store, rank, processes = next(rendezvous("env://"))
        if one_node:  # after a restart the store still holds the addresses of the processes that died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo's collectives do not wait for the GPU
    hour = datetime.timedelta(hours=1)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=hour)
    except RuntimeError as error:
        if one_node:
            raise
        raise UserError(
            f"the nodes cannot reach each other ({one_line(error)}); if the address is 127.0.x.x, set "
            f"GLOO_SOCKET_IFNAME to the network interface on each node (`ip addr` lists them)"
        ) from error
    failed = True
    try:
        yield device
        dist.barrier()
        failed = False
    finally:
        if processes == 1 or not failed:  # after an error the other processes may never get here
            dist.destroy_process_group()


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that supports it natively, else fp32. Before Ampere, bf16 is emulated and slower than fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


@contextlib.contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Rank 0 runs the block before the other ranks do; yields whether this is rank 0."""
    is_rank_zero = dist.get_rank() == 0
    if not is_rank_zero:
        dist.barrier()
    yield is_rank_zero
    if is_rank_zero:
        dist.barrier()


def all_gather_object(value) -> list:
    """The `value` of every process, in rank order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def copy_to_device(tensor: torch.Tensor | np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies to `device` without waiting for queued GPU work."""
    tensor = torch.as_tensor(tensor)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
