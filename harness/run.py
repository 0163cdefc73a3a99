"""A training run and its folder OUT: resuming, printing, saving and stopping. None of the method is here."""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from harness.checkpoint import load_checkpoint, read_state, save_checkpoint
from harness.errors import Stopped, UserError
from harness.files import fsync, write_atomically
from harness.metrics import Metrics
from harness.options import MAY_CHANGE_ON_RESUME
from harness.processes import all_gather_object
from harness.recipes import Recipe, as_typed, beyond_the_paper, recipe_of
from harness.signals import StopSignals

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("train.py", "condition.py", "model.py", "data.py", "beyond.py")  # the code that determines a run's result
PATIENCE = 10  # seconds to wait for a late batch after a signal, so that all processes can finish the step


class Run:
    """A training run. It resumes at `first_step`; if it is `finished`, nothing is left to do.

    train.py calls `started` around the training, `restore` for each stage, `record` for each micro-batch, `log` and
    `save` for each step, and `end`.
    """

    def __init__(self, args: argparse.Namespace, images: str):
        """Reads the state of OUT; `images` is the fingerprint of the images.

        Raises:
            UserError: OUT holds a run with other settings, images or code, or the processes see different images.
        """
        self.args, self.images, self.out = args, images, Path(args.out)
        self.checkpoint = self.out / "checkpoint.pt"
        self.is_rank_zero, self.processes = dist.get_rank() == 0, dist.get_world_size()
        self.settings, self.signals = comparable_settings(args), StopSignals()
        found = [(read_state(self.checkpoint), self.scored_on()) if self.is_rank_zero else None]
        dist.broadcast_object_list(found)  # a network disk may show an older state to another node
        state, scored_on = found[0]
        code = code_hashes()
        self.first_step, self.unreadable, self.codes = 0, 0, [dict(step=0) | code]
        if state:
            self.first_step, self.unreadable, self.codes = state["step"], state["unreadable"], state["code"]
            self.check_same_run(state, code)
        if len(set(all_gather_object(images))) > 1:
            raise UserError("--data: the processes see different images; every node needs the same files")
        self.finished = self.first_step == args.steps and args.mmvp in (None, scored_on)
        if self.finished and self.is_rank_zero:
            print(f"{self.out}: this run is finished; remove that folder to start over")

    def scored_on(self) -> str | None:
        """The --mmvp of the scores in OUT; None if OUT has no scores."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if (self.out / "mmvp" / "scores.json").exists():
                return json.loads((self.out / "args.json").read_text()).get("mmvp")

    def check_same_run(self, state: dict, code: dict[str, str]) -> None:
        """Raises UserError if `state` comes from a run with other settings, images or code."""
        differences = []
        for key, value in self.settings.items():
            before = state["settings"].get(key, getattr(Recipe, key, None))  # options added since had their default
            if as_typed(before) != as_typed(value):
                differences.append(f"{key} {as_typed(before)} there, {as_typed(value)} here")
        if differences:
            raise UserError(
                f"{self.out}: holds another run ({'; '.join(differences)}); choose another --out, or remove that folder"
            )
        if state["images"] != self.images:
            raise UserError(
                f"{self.out}: this run used other images ({state['images']} there, {self.images} here); restore the "
                f"original --data"
            )
        changed = [name for name in METHOD if state["code"][-1].get(name) != code[name]]
        if changed and self.first_step < self.args.steps:
            if not self.args.changed_code:
                raise UserError(
                    f"{self.out}: {', '.join(changed)} changed since this run's last save; choose another --out, or "
                    f"resume anyway with --changed-code"
                )
            self.codes = [*self.codes, dict(step=self.first_step) | code]

    @contextlib.contextmanager
    def started(self, clip, diffusion, conditioner: torch.nn.Module, dataset) -> Iterator[None]:
        """Writes OUT/args.json and prints the plan. In the block, a signal stops the run after the current step.

        UserError: OUT cannot be written.
        """
        self.clip, self.conditioner, self.step = clip, conditioner, self.first_step
        if self.is_rank_zero:
            if self.args.mmvp:  # do not keep scores of another benchmark
                (self.out / "mmvp" / "scores.json").unlink(missing_ok=True)
            packages = ("torch", "open_clip_torch", "diffusers", "transformers")
            versions = {name: importlib.metadata.version(name) for name in packages}
            content = vars(self.args) | dict(versions=versions, code=self.codes)
            write_atomically(self.out / "args.json", json.dumps(content, indent=2) + "\n")
            print(plan(self.args, self.first_step, clip, diffusion, conditioner, dataset), flush=True)
        self.metrics = Metrics(self.args, self.first_step, self.unreadable)
        with self.signals.caught():
            try:
                yield
            finally:
                self.metrics.close()

    def restore(self, optimizer: torch.optim.Optimizer, step_range: range) -> None:
        """Loads the checkpoint into the conditioner and `optimizer`, if the run resumes within `step_range`.

        At a stage boundary the checkpoint holds the optimizer of the previous stage, so the next stage loads only the
        weights.
        """
        self.optimizer = optimizer
        if self.first_step and step_range.start <= self.first_step <= step_range.stop:
            same_stage = self.first_step > step_range.start
            step = load_checkpoint(self.checkpoint, self.conditioner, optimizer if same_stage else None)
            if step != self.first_step:
                raise UserError(f"{self.checkpoint}: at step {step}, not {self.first_step}; all nodes must share --out")
        self.metrics.start_clock()

    def record(self, loss: torch.Tensor, batch: dict) -> None:
        """Records the loss of a micro-batch, without the penalty."""
        self.signals.armed = True
        self.metrics.record(loss, batch)

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        """Logs a step before the optimizer takes it. UserError: not finite, or too many unreadable images."""
        self.metrics.log(step, grad_norm, lr)

    def save(self, step: int) -> None:
        """Saves the checkpoint every --save-every steps, the CLIP every --keep-every steps, and both at the end.

        Raises:
            Stopped: in every process, after saving, if any process received a signal.
        """
        self.step = step
        number = torch.tensor(self.signals.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: it does not wait for the GPU
        last, keep = step == self.args.steps, self.args.keep_every and step % self.args.keep_every == 0
        # All processes wait for a save (2.4 GB for ViT-L-14, 5 GB for ViT-H-14), so --save-every is hundreds of steps.
        if self.is_rank_zero and (last or keep or number or step % self.args.save_every == 0):
            # The conditioner trains CLIP's own tower, so `clip` has the trained weights.
            # CLIPs are saved first: a run that dies before the checkpoint is saved repeats these steps.
            if keep:
                self.clip.save(self.out / f"clip-{step:06}")
            if last:
                self.clip.save(self.out / "clip")
            self.save_checkpoint()
            self.metrics.start_clock()  # do not count the save in the next step's time
        if number:
            dist.barrier()
            self.stop(number.item())

    def save_checkpoint(self) -> None:
        """Saves the state after the last complete step."""
        fsync(self.metrics.path)  # it must not lag behind the checkpoint
        state = dict(step=self.step, unreadable=self.metrics.unreadable, images=self.images)
        state |= dict(settings=self.settings, code=self.codes)
        save_checkpoint(self.checkpoint, self.conditioner, self.optimizer, state)

    def waiting(self) -> None:
        """Called while a batch is late. After a signal, saves the last complete step and raises Stopped.

        Without this, a run would ignore signals while it waits for a disk that hangs. Weights change only at the end of
        a step, so rank 0 can save without the others. With several processes, the late batch first gets PATIENCE
        seconds to arrive, so that they can finish the step.
        """
        if self.signals.number and time.monotonic() > self.signals.time + (PATIENCE if self.processes > 1 else 0):
            if self.is_rank_zero and self.step > self.first_step:
                self.save_checkpoint()
            self.stop(self.signals.number)

    def stop(self, number: int) -> None:
        saved = f", saved in {self.out}" if self.step else ""
        stopped = f"{signal.Signals(number).name}: stopped after {self.step} steps{saved}"
        raise Stopped(f"{stopped}; run the same command again to resume", number)

    def end(self) -> None:
        """Prints how many images were skipped, where the trained CLIP is, and the next commands."""
        if self.is_rank_zero:
            if self.metrics.unreadable:
                print(f"\n{self.metrics.unreadable} images could not be read: see `skipped` in {self.metrics.path}")
            print("\n" + next_steps(self.args, self.clip))


def comparable_settings(args: argparse.Namespace) -> dict:
    """The settings that must not change on resume. Images are compared by fingerprint instead.

    Paths are resolved. Those in this repository are relative to it, so that a moved or copied one can resume its runs.
    """
    kept = {k: v for k, v in vars(args).items() if k not in {*MAY_CHANGE_ON_RESUME, "recipe", "data"}}
    for key in ("clip", "diffusion"):
        if os.path.exists(kept[key]):
            path = Path(kept[key]).resolve()
            kept[key] = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return kept


def code_hashes() -> dict[str, str]:
    """A hash of each file in METHOD, ignoring comments, docstrings and layout. It may vary with the Python version."""
    hashes = {}
    for name in METHOD:
        tree = ast.parse((ROOT / name).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:]
        hashes[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]
    return hashes


def plan(args: argparse.Namespace, first_step: int, clip, diffusion, conditioner, dataset) -> str:
    """What a run will do, in a few lines."""
    tower = sum(p.numel() for p in conditioner.visual.parameters()) / 1e6
    linear = sum(p.numel() for p in conditioner.projection.parameters()) / 1e6
    processes, tokens = dist.get_world_size(), 1 + conditioner.recap.count
    accumulated = args.batch_size // (args.micro_batch * processes)
    beyond = beyond_the_paper(vars(args))
    lines = {
        "recipe": f"{args.recipe}, seed {args.seed}" + (", random weights" if args.random_weights else ""),
        "CLIP θ": f"{args.clip}, {clip.image_size}²; vision tower with {tower:.4g} M parameters",
        "diffusion φ": f"{args.diffusion}, frozen, {args.precision} on {diffusion.text_embedding.device.type}",
        "condition": f"{tokens} token{'s' if tokens > 1 else ''}, recap {args.recap}, text {args.text!r} added by "
        f"{args.join}, linear layer with {linear:.3g} M parameters",
        "images": f"{len(dataset):,} at {dataset.size}², {args.states} noisy states each",
        "steps": f"{first_step:,} to {args.steps:,}, {args.optimizer}, lr {args.lr:g}, batch {args.batch_size} = "
        f"{processes} process{'es' if processes > 1 else ''} × micro-batch {args.micro_batch} × {accumulated} "
        f"accumulated",
        "beyond DIVA": " ".join(beyond) or "no options",
        "scores": f"before and after training, on {args.mmvp}" if args.mmvp else "none (no --mmvp)",
        "writes": args.out,
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def next_steps(args: argparse.Namespace, clip) -> str:
    """Where the trained CLIP is, and the commands to run next."""

    def command(script: str, *arguments: str) -> str:
        return shlex.join(["python", os.path.relpath(ROOT / script), *arguments])

    folder = f"{args.out}/clip"
    lines = {"the CLIP": f'open_clip.create_model_and_transforms("local-dir:{folder}")'}
    if clip.tokenizer_error:
        lines["no tokenizer"] = clip.tokenizer_error
    elif not (args.mmvp or args.random_weights):
        lines["to score it"] = command("evaluate_mmvp.py", recipe_of(args.clip) or args.clip, folder)
    if not args.random_weights and (args.mmvp or args.data != ["synthetic"]):  # what reconstruct.py needs
        lines["to see it"] = command("extras/reconstruct.py", args.out)
    lines["to export it"] = command("extras/export.py", folder, f"{args.out}/transformers")
    lines["its report"] = command("extras/report.py", args.out)
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())
