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
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness.checkpoint import load_checkpoint, read_state, save_checkpoint
from harness.errors import Stopped, UserError
from harness.files import check_renames, replaced_folder, synchronise, write_atomically
from harness.options import MAY_CHANGE_ON_RESUME
from harness.processes import all_gather_object
from harness.recipes import beyond_the_paper, recipe_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what clusters and people send to end a run
METHOD = ("train.py", "condition.py", "model.py", "data.py", "beyond.py")  # whose code decides what a run comes to


class Run:
    """`first_step` is where the run goes on, `finished` whether there is nothing left to do.

    Made once the images are found; then `started` around the training, `restore` for each optimizer, for each step
    `record` (a micro-batch), `log` and `save`, and `end`.
    """

    def __init__(self, args: argparse.Namespace, images: str):
        """Reads what OUT holds; `images` is a fingerprint of the images.

        Raises:
            UserError: OUT holds another run than this one: other settings, other images, or other code; or not all
                processes see the same run.
        """
        self.args, self.images, self.out = args, images, Path(args.out)
        self.main, self.processes = dist.get_rank() == 0, dist.get_world_size()
        self.losses, self.passed_over, self.names, self.signal, self.began = [], [], [], 0, False
        self.settings, self.code = settings_to_keep(args), code_hashes()
        new = dict(step=0, unreadable=0, images=images, settings=self.settings, code=[dict(step=0) | self.code])
        state = read_state(self.out / "checkpoint") or new
        self.first_step, self.unreadable, self.codes = state["step"], state["unreadable"], state["code"]
        scored = not args.mmvp or (self.out / "mmvp" / "scores.json").exists() and self.scored_on() == args.mmvp
        self.finished = self.first_step == args.steps and scored
        if self.first_step:
            self.refuse_another_run(state)
        if len(set(all_gather_object((self.first_step, self.images, self.finished)))) > 1:
            raise UserError("steps taken or images differ between processes; all need the same --out and --data")
        if self.finished and self.main:
            print(f"{self.out}: this run is finished; remove that folder to start anew")

    def scored_on(self) -> str | None:
        """The benchmark of the scores in OUT, as it was named."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((self.out / "args.json").read_text()).get("mmvp")

    def refuse_another_run(self, state: dict) -> None:
        """UserError: the run whose checkpoint is `state` is not this one."""
        differs = []
        for key, value in self.settings.items():
            if state["settings"].get(key) != value:
                differs.append(f"{key} {state['settings'].get(key)!r} there, {value!r} here")
        if differs:
            what = "; ".join(differs)
            raise UserError(f"{self.out}: holds another run ({what}); name another --out, or remove that folder")
        if state["images"] != self.images:
            raise UserError(
                f"{self.out}: its run has other images ({state['images']} there, {self.images} here); bring them back"
            )
        changed = [name for name in METHOD if state["code"][-1].get(name) != self.code[name]]
        if changed and self.first_step < self.args.steps:
            if not self.args.changed_code:
                raise UserError(
                    f"{self.out}: {', '.join(changed)} changed since this run's last save; name another --out, or go "
                    f"on all the same with --changed-code"
                )
            self.codes = [*state["code"], dict(step=self.first_step) | self.code]

    @contextlib.contextmanager
    def started(self, clip, diffusion, conditioner: torch.nn.Module, images) -> Iterator[None]:
        """Makes OUT with its args.json and prints the plan; within the block signals stop the run between steps.

        UserError: OUT cannot hold a run.
        """
        self.clip, self.conditioner, self.metrics = clip, conditioner, self.out / "metrics.jsonl"
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            check_renames(self.out)
            if self.args.mmvp:  # scores of another benchmark must not pass for this one's
                (self.out / "mmvp" / "scores.json").unlink(missing_ok=True)
            packages = ("torch", "open_clip_torch", "diffusers", "transformers")
            versions = {name: importlib.metadata.version(name) for name in packages}
            content = vars(self.args) | dict(versions=versions, code=self.codes)
            write_atomically(self.out / "args.json", json.dumps(content, indent=2) + "\n")
            if self.metrics.exists():  # the lines after the checkpoint come again
                write_atomically(self.metrics, "".join(self.metrics.read_text().splitlines(True)[: self.first_step]))
            print(plan(self.args, self.first_step, clip, diffusion, conditioner, images), flush=True)
        handlers = [signal.signal(number, self.ask_to_stop) for number in SIGNALS]
        batch, every = self.args.batch_size, 0.5 if sys.stderr.isatty() else 30  # seconds: a log file needs no more
        self.bar = tqdm(
            total=self.args.steps * batch, initial=self.first_step * batch, unit="image", mininterval=every,
            dynamic_ncols=True, disable=not self.main,
            bar_format="{l_bar}{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )  # fmt: skip
        try:
            yield
        finally:
            self.bar.close()
            for number, handler in zip(SIGNALS, handlers):
                signal.signal(number, handler or signal.SIG_DFL)

    def restore(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        """Reads the checkpoint, if the run goes on within `steps`: the weights, and what `optimizer` knew of them."""
        self.optimizer = optimizer
        if self.first_step and steps.start <= self.first_step <= steps.stop:
            same = optimizer if self.first_step > steps.start else None  # the first of these steps has a new optimizer
            load_checkpoint(self.out / "checkpoint", self.conditioner, same)
        self.time = time.perf_counter()

    def record(self, loss: torch.Tensor, batch: dict) -> None:
        """Keeps a micro-batch's loss, and the names of the images that could not be read, for `log`."""
        self.began = True
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
            where = [str(rank) for rank, value in enumerate(all_gather_object(float(mine))) if not math.isfinite(value)]
            process = f" (process {', '.join(where)})" if where else ""
            raise UserError(
                f"step {step}: the loss is {loss}, its gradient's norm {grad_norm}{process}; this step was not taken, "
                f"and what was saved before is in {self.out}"
            )
        names = sum(all_gather_object(passed_over), []) if unread else []
        self.names, self.unreadable = (self.names + names)[:3], self.unreadable + len(names)
        reads = (step + 1) * self.args.batch_size + self.unreadable
        if reads >= 100 and self.unreadable * 10 > reads:
            names = "; ".join(self.names)
            raise UserError(f"step {step}: {self.unreadable} of {reads} images could not be read: {names}")

        now = time.perf_counter()
        speed, self.time = self.args.batch_size / (now - self.time), now
        if self.main:
            line = dict(
                step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_second=round(speed, 3),
                peak_memory_gib=round(peak_memory() / 2**30, 3), unreadable=self.unreadable,
            )  # fmt: skip
            if names:
                line["passed_over"] = names
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"step {step + 1}/{self.args.steps}, loss {loss:.4f}, lr {lr:.1e}", refresh=False)

    def save(self, step: int) -> None:
        """Saves CLIP and checkpoint every --save-every steps and at the end, and each CLIP that --keep-every asks for;
        stops the run if a signal asked for it.

        Raises Stopped in every process, once all is saved, if one of them was sent one of SIGNALS.
        """
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU, so that no GPU is waited for
        due = step % self.args.save_every == 0 or step == self.args.steps
        keep = self.args.keep_every and step % self.args.keep_every == 0
        if self.main and (due or keep or number):
            if due:  # before the checkpoint: a run that dies in between comes here again
                with replaced_folder(self.out / "clip") as new:
                    self.clip.save(new)
            if keep:
                with replaced_folder(self.out / f"clip-{step:06}") as new:
                    self.clip.save(new)
            synchronise(self.metrics)  # its lines are never behind the checkpoint
            state = dict(step=step, unreadable=self.unreadable, images=self.images, settings=self.settings)
            state |= dict(code=self.codes)
            save_checkpoint(self.out / "checkpoint", self.conditioner, self.optimizer, state)
            self.time = time.perf_counter()  # the next step's speed is its own
        if number:
            dist.barrier()
            name = signal.Signals(number.item()).name
            raise Stopped(
                f"{name}: stopped after {step} steps, saved in {self.out}; the same command goes on", number.item()
            )

    def ask_to_stop(self, number: int, frame) -> None:
        """What a signal does: `save` sees it. Before the first batch it ends the process as usual: nothing is lost.

        Without torchrun, which repeats it, a second Ctrl-C ends all.
        """
        self.signal = number
        if not self.began or (number == signal.SIGINT and "RANK" not in os.environ):
            signal.signal(number, signal.SIG_DFL)
        if not self.began:
            signal.raise_signal(number)

    def end(self) -> None:
        """Says where the trained CLIP is, and what to type next."""
        if self.main:
            print("\n" + ways_on(self.args, self.clip))


def settings_to_keep(args: argparse.Namespace) -> dict:
    """What must be the same when a run goes on. Paths are resolved: how they are spelled may change.

    Of the images the fingerprint is compared, wherever they are.
    """
    kept = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME and k not in ("recipe", "data")}
    for key in ("clip", "diffusion"):
        if os.path.exists(kept[key]):
            kept[key] = os.path.realpath(kept[key])
    return json.loads(json.dumps(kept))


def code_hashes() -> dict[str, str]:
    """A hash of each file of the method."""
    root = Path(__file__).parents[1]
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:12] for name in METHOD}


def plan(args: argparse.Namespace, first_step: int, clip, diffusion, conditioner, images) -> str:
    """What a run is about to do, in a few lines."""
    tower, linear = (
        sum(p.numel() for p in module.parameters()) / 1e6 for module in (conditioner.visual, conditioner.projection)
    )
    processes, slow, device = dist.get_world_size(), "", diffusion.text_embedding.device
    accumulated, tokens = args.batch_size // (args.micro_batch * processes), 1 + conditioner.recap.count
    if device.type == "cpu" and images.size >= 256:
        slow = f"; slow on a CPU: about {args.batch_size * 5 * (images.size / 512) ** 2:,.0f} TFLOP a step"
    beyond = beyond_the_paper(vars(args))
    lines = {
        "recipe": f"{args.recipe}, seed {args.seed}" + (", random weights" if args.random_weights else ""),
        "CLIP θ": f"{args.clip}, {clip.image_size}²; {tower:.4g} M parameters of its vision tower learn",
        "diffusion φ": f"{args.diffusion}, frozen, {args.precision} on {device.type}",
        "condition": f"{tokens} token{'s' if tokens > 1 else ''}, recap {args.recap}, text {args.text!r} by "
        f"{args.join}, a linear layer of {linear:.3g} M",
        "images": f"{len(images):,} at {images.size}², {args.states} noisy states each",
        "steps": f"{first_step:,} to {args.steps:,}, {args.optimizer}, lr {args.lr:g}, batch {args.batch_size} = "
        f"{processes} process{'es' if processes > 1 else ''} × micro-batch {args.micro_batch} × {accumulated} "
        f"accumulated{slow}",
        "beyond DIVA": " ".join([*beyond, "(see beyond.py)"] if beyond else ["nothing"]),
        "writes": args.out,
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def ways_on(args: argparse.Namespace, clip) -> str:
    """Where the trained CLIP is, and what to type next."""
    folder, quoted = f"{args.out}/clip", shlex.quote(f"{args.out}/clip")
    lines = {"the CLIP": f'open_clip.create_model_and_transforms("local-dir:{folder}")'}
    if clip.tokenizer_error:
        lines["no tokenizer"] = clip.tokenizer_error
    elif not (args.mmvp or args.random_weights):
        lines["to score it"] = f"python evaluate_mmvp.py {shlex.quote(recipe_of(args.clip) or args.clip)} {quoted}"
    lines["to see it"] = f"python extras/reconstruct.py {shlex.quote(args.out)} FILE.png"
    lines["to export it"] = f"python extras/export.py {quoted} DIR"
    lines["its report"] = f"python extras/report.py {shlex.quote(args.out)}"
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def peak_memory() -> int:
    """The most that this process has held so far, in bytes: on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB
