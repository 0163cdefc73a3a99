"""What a training step costs in time (part by part), memory and TFLOP, next to the released code's step.

    python extras/bench.py                                                 # the miniature
    python extras/bench.py --recipe openai-vit-l-14-224 --micro-batch 32   # takes all options of train.py
    python extras/bench.py --recipe openai-vit-l-14-224 --as-released      # adds the released code's step, imitated

It times train.py's own loop, on one device and without DDP, with random weights and synthetic images. A step is one
micro-batch and one update; a run with accumulation updates less often. Nothing is downloaded.

The parts: "draws" are t, ε and the patches, drawn on the CPU and copied; "U-Net forward" includes z_t, "backward" the
loss and the penalty of --ldifs, "optimizer" the clipping of gradients. Each part ends with a device synchronization, so
on a GPU the parts add up to more than the step. A compiled step is not split.
Memory: the peak allocated on the GPU during a step; without a GPU, the peak of the process.
Work: counted on torch's meta device, not measured; attention counts as two matrix products.
The released step alternates with ours, and each pair yields a ratio, so a slowdown of the machine affects both.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.options import count_processes, parse_args


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of train.py for one micro-batch per step, and this command's own options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Also takes all options of train.py.", allow_abbrev=False
    )
    parser.error = usage_error
    add = parser.add_argument
    add("--times", type=int, default=10, metavar="N", help="how often to measure each figure (default: 10)")
    add("--as-released", action="store_true", help="also measure an imitation of the released code's step")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms and choose the fastest")
    add("--channels-last", action="store_true", help="convert the VAE and the U-Net to the channels_last layout")
    own, options = parser.parse_known_args(argv)
    if own.times < 1:
        raise UserError("--times: must be at least 1")
    args = parse_args([*options, "--random-weights", "--data", "synthetic", "--projection", "random"])
    if count_processes() > 1:
        raise UserError("measures one process: start it with python, not with torchrun")
    args.batch_size = args.micro_batch
    return argparse.Namespace(**vars(args) | vars(own))


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("bench.py"):
        args = read_args()

import copy
import datetime
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import data
import train
from beyond import Ldifs, stages
from harness.metrics import peak_memory
from harness.processes import default_precision
from model import Diffusion


class NoRun:
    """Replaces harness/run.py's `Run` in the loop; records, logs and saves nothing."""

    first_step = 0

    def record(self, loss: torch.Tensor, batch: dict) -> None: ...
    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None: ...
    def save(self, step: int) -> None: ...


class Step:
    """One step of train.py's loop that trains θ, on the same micro-batch of synthetic images each time.

    `args` come from `read_args`, with `precision` set. On the device "meta" nothing is computed.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.run = args, device, NoRun()
        self.clip, self.diffusion, self.conditioner = train.build(args, device)
        if args.channels_last:
            for module in (self.diffusion.vae, self.diffusion.unet):
                module.to(memory_format=torch.channels_last)
        penalty = Ldifs(self.clip, args.ldifs) if args.ldifs else None
        optimizer = train.build_optimizer(args, self.conditioner, stages(args, self.conditioner)[-1][0])
        self.draws = train.Draws(args.seed, self.conditioner.recap, args.states, range(*args.timesteps))
        self.stage = train.Stage(optimizer, range(1), args.lr, args.warmup, 1, args.max_grad_norm, penalty)
        dataset = data.TrainingImages(None, args.image_size or self.diffusion.image_size, args.batch_size, args.seed)
        self.batch = data.collate([dataset[0, i] for i in range(args.micro_batch)])

    def batches(self) -> Iterator[dict]:
        yield data.to_device(self.batch, self.device)

    def __call__(self) -> float:
        """Takes one step; returns its seconds."""
        start = now(self.device)
        train.algorithm_1(self.conditioner, self.diffusion, self.batches(), self.draws, self.stage, self.run)
        return now(self.device) - start

    def parts(self) -> Counter:
        """Takes one step, not compiled, and synchronizes after each part; returns the seconds of each."""
        seconds, last = Counter(), now(self.device)

        def timed(function: Callable, part: str) -> Callable:
            """Wraps `function`: adds the time since the last timed call returned to `part`."""

            def call(*args):
                nonlocal last
                result, end = function(*args), now(self.device)
                seconds[part] += end - last
                last = end
                return result

            return call

        with ExitStack() as stack:
            for owner, name, part in (  # in the order of the loop
                (data, "to_device", "copy"),
                (train, "image_rngs", "draws"),
                (train, "draw_patch_indices", "draws"),
                (self.conditioner, "forward", "CLIP"),
                (self.diffusion, "encode", "VAE"),
                (train, "draw_states", "draws"),
                (self.diffusion.unet, "forward", "U-Net forward"),
                (self.run, "record", "backward"),
                (self.run, "save", "optimizer"),
            ):
                stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
            self()
        return seconds


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class ReleasedStep(Step):
    """Imitates the cost of the released code's step with the models of `step`, not its code or its numbers.

    The N states of an image go one by one through CLIP, φ's text encoder and the U-Net, each with its own backward
    pass; the VAE encodes an image once. φ is held in fp32, so autocast casts its weights at each use. Not imitated: the
    first state's weight in the gradient, how patches are drawn, how the VAE's input is normalized, and the overhead of
    the Trainer around the step.
    """

    def __init__(self, step: Step):
        self.args, self.device, self.run, self.batch = step.args, step.device, step.run, step.batch
        self.conditioner, name = step.conditioner, step.args.diffusion
        self.draws = replace(step.draws, states=1)  # in the loop each state is a micro-batch
        self.stage = replace(step.stage, accumulation=step.draws.states, penalty=None)
        if os.path.isdir(name):
            config = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder")
        else:  # that of 2.1-base
            depth = dict(num_hidden_layers=23, num_attention_heads=16)
            config = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, **depth)
        with torch.device(self.device):
            self.text_encoder = CLIPTextModel(config).requires_grad_(False).eval()
            self.tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)
        vae, unet = copy.deepcopy(step.diffusion.vae).float(), copy.deepcopy(step.diffusion.unet).float()
        kind = "cuda" if self.device.type == "cuda" else "cpu"  # there is no autocast for meta
        cast = torch.autocast(kind, torch.bfloat16, enabled=step.diffusion.unet.dtype == torch.bfloat16)
        for module, name in ((vae, "encode"), (unet, "forward"), (self.text_encoder, "forward")):
            setattr(module, name, cast(getattr(module, name)))
        self.diffusion = replace(step.diffusion, vae=vae, unet=unet)

    def batches(self) -> Iterator[dict]:
        batch = data.to_device(self.batch, self.device)
        latents = Diffusion.encode(self.diffusion, batch["images"])
        self.diffusion.encode = lambda images: latents  # once for all states
        for state in range(self.stage.accumulation):
            self.diffusion.text_embedding = self.text_encoder(self.tokens).last_hidden_state.float()
            yield batch | dict(keys=[(state, position) for _, position in batch["keys"]])


def on_meta(args: argparse.Namespace) -> Step:
    """The step of `args` on the meta device; not compiled, since the counter cannot see into compiled kernels."""
    meta = torch.device("meta")
    with meta:
        return Step(argparse.Namespace(**vars(args) | dict(compile=False)), meta)


def executed_work(step: Step) -> float:
    """The TFLOP per image that a step on the meta device executes, by torch's own counter.

    What a fused kernel recomputes in its backward pass is not counted.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / step.args.micro_batch / 1e12


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """All measurements of a step, by figure."""
    meta, step, figures = on_meta(args), Step(args, device), defaultdict(list)
    work, image = executed_work(meta), 1000 / args.micro_batch  # TFLOP per image; seconds → ms per image
    step()
    if device.type == "cuda":  # exclude the peak while loading
        torch.cuda.reset_peak_memory_stats()
    step()
    memory = peak_memory() / 2**30
    if args.as_released:
        released = ReleasedStep(step)
        released()
    for _ in range(args.times):
        seconds = step()
        figures["the step, ms per image"].append(seconds * image)
        if not args.compile:
            for part, part_seconds in step.parts().items():
                figures[f"… {part}"].append(part_seconds * image)
        figures["images per second"].append(args.micro_batch / seconds)
        figures["TFLOP/s"].append(work * args.micro_batch / seconds)
        if args.as_released:
            released_seconds = released()
            figures["the released step, ms per image"].append(released_seconds * image)
            figures["… relative to our step"].append(released_seconds / seconds)
    figures |= {"memory, GiB": [memory], "work, TFLOP per image": [work]}
    if args.as_released:
        figures["… of the released step"] = [executed_work(ReleasedStep(meta))]
    return figures


def number(value: float) -> str:
    """The value with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def markdown(figures: dict[str, list[float]]) -> str:
    """A table of each figure's median, minimum and maximum, and the number of its measurements."""
    lines = ["| | median | min … max | times |", "|---|---|---|---|"]
    for name, values in figures.items():
        spread = f"{number(min(values))} … {number(max(values))}"
        lines.append(f"| {name} | {number(median(values))} | {spread} | {len(values)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    args.precision = args.precision or default_precision(device)
    figures = measure(args, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.recipe}, {args.precision}, micro-batch {args.micro_batch}, N = {args.states}")
    print(f"{name}, torch {torch.__version__}, {datetime.date.today()}\n\n{markdown(figures)}")


if __name__ == "__main__":
    with exit_on_user_error("bench.py", "try a smaller --micro-batch"):
        main(args)
