"""What a run tells and what ends it: the plan, the bar, metrics.jsonl, signals. Nothing of the method."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from condition import VisualCondition
from data import TrainingImages
from model import Clip, Stopped, write_whole

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what clusters and people send to end a run


def plan(
    args: argparse.Namespace, first_step: int, clip: Clip, encoder: VisualCondition, images: TrainingImages, device
) -> str:
    """What a run is about to do, in a few lines."""
    processes = dist.get_world_size()
    tower, linear = (
        sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
        for module in (encoder.visual, encoder.projection)
    )
    lines = {
        "recipe": f"{args.recipe}, seed {args.seed}{', random weights' * args.random_weights}",
        "CLIP θ": f"{args.clip}, {clip.image_size}²; trains {tower:.4g} M parameters of its vision tower "
        f"and {linear:.3g} M of the linear layer",
        "diffusion φ": f"{args.diffusion}, frozen, {args.precision} on {device.type}",
        "condition": f"{1 + encoder.count} tokens, recap {args.recap}, text {args.text!r} by {args.join}",
        "images": f"{len(images):,} at {images.size}², {args.states} noisy states each",
        "steps": f"{first_step:,} to {args.steps:,}, lr {args.lr:g}, batch {args.batch_size} = "
        f"{processes} process{'es' * (processes > 1)} × micro-batch {args.micro_batch} "
        f"× {args.batch_size // (args.micro_batch * processes)} accumulated",
        "writes": args.out,
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def ways_on(args: argparse.Namespace, clip: Clip) -> str:
    """Where the trained CLIP is, and what to type next."""
    folder = f"{args.out}/clip"
    lines, quoted = {"the CLIP": f'open_clip.create_model_and_transforms("local-dir:{folder}")'}, shlex.quote(folder)
    if clip.no_tokenizer:
        lines["no tokenizer"] = clip.no_tokenizer
    elif not (args.mmvp or args.random_weights):
        lines["to score it"] = f"python evaluate_mmvp.py {shlex.quote(args.clip)} {quoted} --mmvp MMVP/MMVP_VLM"
    lines["to export it"] = f"python extras/export.py {quoted} DIR"
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


class Log:
    """The bar and metrics.jsonl, both of the first process, and the three reasons to stop a run."""

    def __init__(self, args: argparse.Namespace, first_step: int, unreadable: int):
        self.args, self.first, self.unreadable = args, dist.get_rank() == 0, unreadable
        self.names, self.smooth, self.signal, self.settled = [], None, 0, first_step + 3
        self.handlers = [signal.signal(number, self.note_signal) for number in SIGNALS]
        self.path = Path(args.out) / "metrics.jsonl"
        if self.first and self.path.exists():  # a resumed run: the lines after its checkpoint come again
            write_whole(self.path, "".join(self.path.read_text().splitlines(True)[:first_step]))
        every = 0.5 if sys.stderr.isatty() else 30  # seconds: a log file needs no more
        self.bar = tqdm(
            total=args.steps, initial=first_step, unit="step", mininterval=every, dynamic_ncols=True,
            disable=not self.first, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.time = time.perf_counter()

    def step(self, step: int, losses: list, unreadable: list[str], grad_norm: torch.Tensor, lr: float) -> None:
        """Logs a step that is about to be taken, averaged over the processes: its one host–device sync.

        SystemExit, the same in every process: the loss or its gradient is not finite, or more than one image in ten
        cannot be read.
        """
        mine = sum(losses) / len(losses)
        sums = torch.stack([mine / dist.get_world_size(), torch.full_like(grad_norm, len(unreadable))])
        dist.all_reduce(sums)
        loss, unread, grad_norm = torch.cat([sums, grad_norm[None]]).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = [rank for rank, value in enumerate(everyone(float(mine))) if not math.isfinite(value)]
            self.close()
            raise SystemExit(
                f"step {step}: the loss is {loss}, its gradient's norm {grad_norm}"
                + f" (process {', '.join(map(str, where))})" * bool(where)
                + f"; this step was not taken, and what was saved before is in {self.args.out}"
            )
        names = sum(everyone(unreadable), []) if unread else []
        self.names, self.unreadable = (self.names + names)[:3], self.unreadable + len(names)
        reads = (step + 1) * self.args.batch_size + self.unreadable
        if reads >= 100 and self.unreadable * 10 > reads:
            self.close()
            names = "; ".join(self.names)
            raise SystemExit(f"step {step}: {self.unreadable} of {reads} images could not be read: {names}")

        now = time.perf_counter()
        speed, self.time = self.args.batch_size / (now - self.time), now
        self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        if self.first:
            line = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_second=round(speed, 3))
            line |= dict(peak_memory_gib=round(peak_memory() / 2**30, 3), unreadable=self.unreadable)
            line |= dict(passed_over=names) if names else {}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"smoothed loss {self.smooth:.4f}, {speed:.3g} images/s, lr {lr:.1e}", refresh=False)
        self.bar.update()
        if self.first and step == self.settled < self.args.steps - 1:  # a step now takes what it takes
            left = (self.args.steps - step - 1) * self.args.batch_size / speed
            tqdm.write(f"at {speed:.3g} images/s the steps to come take {tqdm.format_interval(left)}", file=sys.stderr)

    def close(self) -> None:
        """Ends the bar, and gives signals their usual meaning back."""
        self.bar.close()
        for number, handler in zip(SIGNALS, self.handlers):
            signal.signal(number, handler or signal.SIG_DFL)

    def note_signal(self, number: int, frame) -> None:
        """What a signal does: `stop_if_asked` sees it. Without torchrun, which repeats it, a second Ctrl-C ends all."""
        self.signal = number
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def stop_if_asked(self, step: int, save: Callable[[int], None]) -> None:
        """Ends the run if any process was sent one of SIGNALS, with the steps that were taken, 0 to `step` - 1, saved.

        Called between two micro-batches; Stopped, the same in every process.
        """
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU, so that no GPU is waited for
        if number:
            if self.first:
                save(step)
            dist.barrier()
            self.close()
            name, out = signal.Signals(number.item()).name, self.args.out
            raise Stopped(f"{name}: stopped after {step} steps, saved in {out}; the same command goes on", int(number))


def peak_memory() -> int:
    """The most that this process has held so far, in bytes: on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB


def everyone(mine) -> list:
    """A value of each process, in all of them."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values
