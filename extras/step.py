"""train.py's step, driven from outside: to time it, to count its work, and beside the released code's.

`train.algorithm_1` is called as a run calls it, with a micro-batch that was read beforehand and with a small object in
the place of `run`. That object and forward hooks tell where a part of the step ends, so no line of the loop is copied.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from data import collate, to_device
from model import Diffusion

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of each channel
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Marks:
    """In the place of train.py's `run`: `mark(part)` is called where a part of the step ends."""

    first_step = 0

    def __init__(self, mark: Callable[[str], None]):
        self.mark = mark

    def note(self, loss: torch.Tensor, batch: dict) -> None:
        self.mark("backward")

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        if not grad_norm.is_meta:
            grad_norm.item()  # a run reads it too: it is the step's one host–device sync

    def save(self, step: int) -> None:
        self.mark("optimizer")


class Step:
    """`step()` is one step of train.py: one micro-batch of synthetic images, and the optimizer.

    Args:
        args: of `parse_args`, with a precision.
        device: "meta" too, where nothing is computed.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.device = device
        self.args = argparse.Namespace(**vars(args) | dict(steps=1, projection_steps=0, pull=0))  # a step that trains θ
        self.clip, self.diffusion, self.conditioner, self.images = train.build(self.args, device, files=None)
        self.optimizer = train.build_optimizer(self.args, self.conditioner)
        self.take(args.micro_batch)

    def take(self, micro_batch: int) -> None:
        """Reads the images of the steps to come."""
        batch = collate([self.images[0, i] for i in range(micro_batch)])
        if self.device.type == "cuda":  # pinned, as `read_batches` gives them
            batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        self.batch, self.args.micro_batch, self.args.batch_size = batch, micro_batch, micro_batch

    def batches(self, mark: Callable[[str], None]) -> Iterator[dict]:
        """The same micro-batch again and again, each time copied to the device."""
        while True:
            batch = to_device(self.batch, self.device)
            mark("copy")
            yield batch

    def __call__(self, mark: Callable[[str], None] | None = None) -> None:
        """One step; `mark` is told the name of each part when it ends. A compiled module takes no marks."""
        hooks, unet = [], self.diffusion.unet
        if mark:
            hooks = [
                self.conditioner.register_forward_hook(lambda *_: mark("CLIP")),
                unet.register_forward_pre_hook(lambda *_: mark("VAE")),
                unet.register_forward_hook(lambda *_: mark("U-Net forward")),
            ]
        mark = mark or (lambda part: None)
        try:
            train.algorithm_1(
                self.args, self.clip, self.diffusion, self.conditioner, self.optimizer, self.batches(mark), Marks(mark)
            )
        finally:
            self.optimizer.zero_grad()  # also of a step that did not fit into memory
            for hook in hooks:
                hook.remove()

    def warm_up(self) -> None:
        """Takes a step, and keeps how long it took. On a GPU the micro-batch is halved until it fits."""
        while True:
            start = now(self.device)
            try:
                self()
                self.seconds = now(self.device) - start
                return
            except torch.OutOfMemoryError:
                if self.args.micro_batch == 1:
                    raise
            release_memory()
            self.take(self.args.micro_batch // 2)

    def parts(self) -> dict[str, float]:
        """Seconds of each part of one step; the device is waited for at each border."""
        seconds, border = {}, now(self.device)

        def mark(part: str) -> None:
            nonlocal border
            seconds[part] = now(self.device) - border
            border += seconds[part]

        self(mark)
        return seconds


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def release_memory() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing


# ---------------------------------------------------------------------------------------------------------------------
# Work, on the meta device


class Unwritten(TorchFunctionMode):
    """Leaves new weights unwritten: of a model on its way to the meta device only the shapes are read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def on_meta(args: argparse.Namespace) -> Step:
    """The step of `args` with shapes alone, not compiled: the counter does not see into compiled kernels."""
    args = argparse.Namespace(**vars(args) | dict(compile=False))
    with Unwritten():
        return Step(args, torch.device("meta"))


def executed_work(step: Step) -> Counter:
    """TFLOP per image of each part of a step on the meta device, by torch's own counter.

    Attention counts as two products of matrices. What a fused kernel computes again in its backward pass is not work.
    """
    work, counter = Counter(), FlopCounterMode(display=False)
    with counter:
        step(lambda part: work.update({part: counter.get_total_flops() - work.total()}))
    return Counter({part: flop / step.args.micro_batch / 1e12 for part, flop in work.items()})


def least_work(step: Step) -> Counter:
    """The least TFLOP per image, from one forward pass of each model alone and a rule for what must come back.

    A product costs as much again for the gradient of each of its factors. The VAE needs none. CLIP's tower needs both,
    but for that of the pixels. The frozen U-Net needs those of activations, which are one factor in a layer and both in
    attention, and none before the first layer that reads the condition: what is there depends on z_t and t alone.
    """
    vae, unet, meta = step.diffusion.vae, step.diffusion.unet, partial(torch.empty, device="meta")
    latents = meta(1, *step.diffusion.latent_shape(step.images.size), dtype=unet.dtype)
    condition = meta(1, 1 + step.conditioner.recap.count, unet.config.cross_attention_dim, dtype=unet.dtype)
    readers = [module.to_k for name, module in unet.named_modules() if name.endswith(".attn2")]
    image, _ = forward_work(vae.encode, meta(1, 3, step.images.size, step.images.size, dtype=vae.dtype))
    tower, _ = forward_work(step.conditioner.visual, meta(1, 3, step.clip.image_size, step.clip.image_size))
    state, behind = forward_work(unet, latents, meta(1, dtype=torch.int64), condition, since=readers)
    pixels, attention = tower["convolution"], behind["bmm"]  # of a batch of one, layers are never bmm
    flop = dict(VAE=image.total(), CLIP=3 * tower.total() - pixels)
    flop["U-Net"] = step.args.states * (state.total() + behind.total() + attention)
    return Counter({part: flop / 1e12 for part, flop in flop.items()})


def forward_work(model: Callable, *inputs: torch.Tensor, since: Sequence = ()) -> tuple[Counter, Counter]:
    """FLOP of a forward pass by operator: all, and those from the first call of one of the modules `since` on."""
    counts, counter = [], FlopCounterMode(display=False)

    def note(*_) -> None:
        counts.append(Counter({op.__name__: flop for op, flop in counter.get_flop_counts()["Global"].items()}))

    hooks = [module.register_forward_pre_hook(note) for module in since]
    with counter:
        model(*inputs)
    note()
    for hook in hooks:
        hook.remove()
    return counts[-1], counts[-1] - counts[0]


# ---------------------------------------------------------------------------------------------------------------------
# The released step


class ReleasedStep(Step):
    """An imitation of the released step's work with the models of `step`; not its code, and not its numbers.

    As there: the N states of an image go one by one through CLIP, φ's text encoder and the U-Net, each with a backward
    pass of its own; the VAE encodes an image once; φ is held in fp32 and computed under autocast, so its weights are
    cast anew at each use; the VAE's input is normalised for OpenAI's CLIP and brought back by ImageNet's numbers. The
    U-Net is frozen there too, so no weight gradients are added. Not imitated: the first state's weight in the
    gradient, the way patches are drawn, and what the Trainer around the step costs.
    """

    def __init__(self, step: Step):
        self.device, self.clip, self.conditioner, self.images = step.device, step.clip, step.conditioner, step.images
        self.optimizer, self.args = step.optimizer, copy.copy(step.args)
        self.diffusion = ReleasedDiffusion(step.diffusion, self.args.diffusion, self.device)
        self.take(step.args.micro_batch)

    def take(self, micro_batch: int) -> None:
        super().take(micro_batch)
        self.args.batch_size *= self.args.states  # to the loop each state is a micro-batch of its own

    def batches(self, mark: Callable[[str], None]) -> Iterator[dict]:
        while True:
            batch = to_device(self.batch, self.device)
            drawn = {k: v for k, v in batch.items() if torch.is_tensor(v) and k != "images"}  # (B, N, ...)
            for i in range(self.args.states):
                yield batch | {k: v[:, i : i + 1] for k, v in drawn.items()}


class ReleasedDiffusion(Diffusion):
    """φ in fp32 under autocast to the precision of `diffusion`; its `text` is embedded anew each time it is read."""

    def __init__(self, diffusion: Diffusion, name: str, device: torch.device):
        dtype = diffusion.unet.dtype
        kind = "cuda" if device.type == "cuda" else "cpu"  # there is no autocast for meta
        cast = torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)
        if os.path.isdir(name):
            config = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder")
        else:  # 2.1-base's
            width = dict(hidden_size=1024, intermediate_size=4096)
            config = CLIPTextConfig(**width, num_hidden_layers=23, num_attention_heads=16)
        self.text_encoder = CLIPTextModel(config).requires_grad_(False).eval().to(device)
        self.tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64, device=device)
        self.vae, self.unet = copy.deepcopy(diffusion.vae).float(), copy.deepcopy(diffusion.unet).float()
        self.vae.encode, self.unet.forward = cast(self.vae.encode), cast(self.unet.forward)
        self.text_encoder.forward = cast(self.text_encoder.forward)
        self.alphas_cumprod, self.prediction_type = diffusion.alphas_cumprod, diffusion.prediction_type
        self.numbers = torch.tensor([*OPENAI, *IMAGENET], device=device)[:, :, None, None]
        self.encoded = None, None

    @property
    def text(self) -> torch.Tensor:
        return self.text_encoder(self.tokens).last_hidden_state.float()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """As `Diffusion.encode`; the states of an image share its latents."""
        if self.encoded[0] is not images:
            mean, std, imagenet_mean, imagenet_std = self.numbers
            self.encoded = images, super().encode((images - mean) / std * imagenet_std + imagenet_mean)
        return self.encoded[1]
