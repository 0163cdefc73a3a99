"""A run in its folder OUT: where it goes on, what it tells, what it saves, and what stops it. Nothing of the method."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness.checkpoint import load_checkpoint, read_state, save_checkpoint
from harness.errors import Stopped, UserError
from harness.files import replaced_folder, synchronise, write_whole
from harness.options import FREE
from harness.processes import everyone

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what clusters and people send to end a run


class Run:
    """`first_step` is where the run goes on, `finished` whether there is nothing left to do.

    Made once the images are found; then `start`, for each step `note` (a micro-batch), `log` and `save`, and `close`.
    """

    def __init__(self, args: argparse.Namespace, images: int):
        """Reads what OUT holds. UserError: another run than this one, or one of another number of images."""
        self.args, self.images, self.out = args, images, Path(args.out)
        self.main, self.processes = dist.get_rank() == 0, dist.get_world_size()
        self.losses, self.passed_over, self.names, self.signal = [], [], [], 0
        state = read_state(self.out / "checkpoint") or dict(step=0, unreadable=0, images=images, args={})
        self.first_step, self.unreadable = state["step"], state["unreadable"]
        here, there = json.loads(json.dumps(vars(args))), state["args"]
        differs = [k for k in here if k not in FREE and self.first_step and there.get(k) != here[k]]
        if differs:
            what = "; ".join(f"{k} {there.get(k)!r} there, {here[k]!r} here" for k in differs)
            raise UserError(f"{self.out}: holds another run ({what}); name another --out, or remove that folder")
        if state["images"] != images:
            raise UserError(
                f"{self.out}: its run has {state['images']} images, --data now {images}; bring them back to go on"
            )
        scored = not args.mmvp or (self.out / "mmvp" / "scores.json").exists()
        self.finished = self.first_step == args.steps and scored

    def finished_line(self) -> str:
        """What to say of a finished run."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads((self.out / "args.json").read_text()).get("code") != code_hash():
                return f"{self.out}: this run is finished, by other code than today's; remove that folder to start anew"
        return f"{self.out}: this run is finished; remove that folder to start anew"

    def start(self, clip, module: torch.nn.Module, optimizer) -> None:
        """Makes OUT with its args.json, or loads its checkpoint; from here on signals stop the run between steps.

        UserError: the checkpoint cannot be read, or processes do not see the same run.
        """
        self.clip, self.module, self.optimizer = clip, module, optimizer
        self.metrics = self.out / "metrics.jsonl"
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            packages = ("torch", "open_clip_torch", "diffusers", "transformers")
            versions = {name: importlib.metadata.version(name) for name in packages}
            settings = vars(self.args) | dict(versions=versions, code=code_hash())
            write_whole(self.out / "args.json", json.dumps(settings, indent=2) + "\n")
            if self.metrics.exists():  # the lines after the checkpoint come again
                write_whole(self.metrics, "".join(self.metrics.read_text().splitlines(True)[: self.first_step]))
        if self.first_step:
            load_checkpoint(self.out / "checkpoint", module, optimizer)
        if len(set(everyone((self.first_step, self.images)))) > 1:
            raise UserError("steps taken or images differ between processes; all need the same --out and --data")
        self.handlers = [signal.signal(number, self.ask_to_stop) for number in SIGNALS]
        batch, every = self.args.batch_size, 0.5 if sys.stderr.isatty() else 30  # seconds: a log file needs no more
        self.bar = tqdm(
            total=self.args.steps * batch, initial=self.first_step * batch, unit="image", mininterval=every,
            dynamic_ncols=True, disable=not self.main,
            bar_format="{l_bar}{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )  # fmt: skip
        self.time = time.perf_counter()

    def note(self, loss: torch.Tensor, batch: dict) -> None:
        """Keeps a micro-batch's loss, and the names of the images that could not be read, for `log`."""
        self.losses.append(loss.detach())
        self.passed_over += batch["unreadable"]
        self.bar.update(len(batch["images"]) * self.processes)

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        """Logs a step that is about to be taken, averaged over the processes: its one host–device sync.

        UserError, the same in every process: the loss or its gradient is not finite, or more than one image in ten
        cannot be read.
        """
        mine, passed_over = sum(self.losses) / len(self.losses), self.passed_over
        self.losses, self.passed_over = [], []
        sums = torch.stack([mine / self.processes, torch.full_like(grad_norm, len(passed_over))])
        dist.all_reduce(sums)
        loss, unread, grad_norm = torch.cat([sums, grad_norm[None]]).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = [str(rank) for rank, value in enumerate(everyone(float(mine))) if not math.isfinite(value)]
            process = f" (process {', '.join(where)})" if where else ""
            raise UserError(
                f"step {step}: the loss is {loss}, its gradient's norm {grad_norm}{process}; this step was not taken, "
                f"and what was saved before is in {self.out}"
            )
        names = sum(everyone(passed_over), []) if unread else []
        self.names, self.unreadable = (self.names + names)[:3], self.unreadable + len(names)
        reads = (step + 1) * self.args.batch_size + self.unreadable
        if reads >= 100 and self.unreadable * 10 > reads:
            names = "; ".join(self.names)
            raise UserError(f"step {step}: {self.unreadable} of {reads} images could not be read: {names}")

        now = time.perf_counter()
        speed, self.time = self.args.batch_size / (now - self.time), now
        if self.main:
            line = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_second=round(speed, 3))
            line |= dict(peak_memory_gib=round(peak_memory() / 2**30, 3), unreadable=self.unreadable)
            if names:
                line["passed_over"] = names
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"step {step + 1}/{self.args.steps}, loss {loss:.4f}, lr {lr:.1e}", refresh=False)

    def save(self, step: int) -> None:
        """Saves CLIP and checkpoint every --save-every steps and at the end; stops the run if a signal asked for it.

        Raises Stopped in every process, once all is saved, if one of them was sent one of SIGNALS.
        """
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU, so that no GPU is waited for
        due = step % self.args.save_every == 0 or step == self.args.steps
        if self.main and (due or number):
            if due:  # before the checkpoint: a run that dies in between comes here again
                with replaced_folder(self.out / "clip") as new:
                    self.clip.save(new)
            synchronise(self.metrics)  # its lines are never behind the checkpoint
            state = dict(step=step, unreadable=self.unreadable, images=self.images, args=vars(self.args))
            save_checkpoint(self.out / "checkpoint", self.module, self.optimizer, state)
            self.time = time.perf_counter()  # the next step's speed is its own
        if number:
            dist.barrier()
            name = signal.Signals(number.item()).name
            raise Stopped(
                f"{name}: stopped after {step} steps, saved in {self.out}; the same command goes on", number.item()
            )

    def close(self) -> None:
        """Ends the bar, and gives signals their usual meaning back."""
        self.bar.close()
        for number, handler in zip(SIGNALS, self.handlers):
            signal.signal(number, handler or signal.SIG_DFL)

    def ask_to_stop(self, number: int, frame) -> None:
        """What a signal does: `save` sees it. Without torchrun, which repeats it, a second Ctrl-C ends all."""
        self.signal = number
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def code_hash() -> str:
    """Of the method's files: tells runs of changed code apart."""
    files = sorted(file for file in Path(__file__).parents[1].glob("*.py") if file.name != "test_smoke.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def plan(args: argparse.Namespace, first_step: int, clip, conditioner, images, device) -> str:
    """What a run is about to do, in a few lines."""
    tower, linear = (
        sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
        for module in (conditioner.visual, conditioner.projection)
    )
    processes, slow = dist.get_world_size(), ""
    accumulated, tokens = args.batch_size // (args.micro_batch * processes), 1 + conditioner.recap.count
    if device.type == "cpu" and images.size >= 256:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        hours = args.batch_size * 5 * (images.size / 512) ** 2 / (0.1 * cores) / 3600
        slow = f"; slow: about {hours:.1g} hours a step on {cores} cores (5 TFLOP an image, 0.1 TFLOP/s a core)"
    lines = {
        "recipe": f"{args.recipe}, seed {args.seed}" + (", random weights" if args.random_weights else ""),
        "CLIP θ": f"{args.clip}, {clip.image_size}²; trains {tower:.4g} M parameters of its vision tower "
        + (f"and {linear:.3g} M of the linear layer" if linear else "alone"),
        "diffusion φ": f"{args.diffusion}, frozen, {args.precision} on {device.type}",
        "condition": f"{tokens} token{'s' if tokens > 1 else ''}, recap {args.recap}, "
        f"text {args.text!r} by {args.join}",
        "images": f"{len(images):,} at {images.size}², {args.states} noisy states each",
        "steps": f"{first_step:,} to {args.steps:,}, lr {args.lr:g}, batch {args.batch_size} = {processes} "
        f"process{'es' if processes > 1 else ''} × micro-batch {args.micro_batch} × {accumulated} accumulated{slow}",
        "writes": args.out,
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def ways_on(args: argparse.Namespace, clip) -> str:
    """Where the trained CLIP is, and what to type next."""
    folder, quoted = f"{args.out}/clip", shlex.quote(f"{args.out}/clip")
    lines = {"the CLIP": f'open_clip.create_model_and_transforms("local-dir:{folder}")'}
    if clip.no_tokenizer:
        lines["no tokenizer"] = clip.no_tokenizer
    elif not (args.mmvp or args.random_weights):
        lines["to score it"] = f"python evaluate_mmvp.py {shlex.quote(args.clip)} {quoted} --mmvp MMVP/MMVP_VLM"
    lines["to export it"] = f"python extras/export.py {quoted} DIR"
    lines["its report"] = f"python extras/report.py {shlex.quote(args.out)}"
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def peak_memory() -> int:
    """The most that this process has held so far, in bytes: on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB
