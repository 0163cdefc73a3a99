"""What a run logs: OUT/metrics.jsonl with a line for each step, the progress bar, and the images that were skipped."""

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness.errors import UserError, warn
from harness.files import write_atomically
from harness.processes import all_gather_object

TIMED_STEPS = 10  # steps to time, after the first, before estimating the duration


class Metrics:
    """Logs the steps from `first_step`; `unreadable` counts the images that could not be read since the run began."""

    def __init__(self, args: argparse.Namespace, first_step: int, unreadable: int):
        self.args, self.first_step, self.unreadable = args, first_step, unreadable
        self.path, self.bar = Path(args.out, "metrics.jsonl"), None
        self.is_rank_zero, self.processes = dist.get_rank() == 0, dist.get_world_size()
        self.losses, self.skipped, self.names = [], [], []
        if self.is_rank_zero and self.path.exists():  # steps after the checkpoint are repeated
            write_atomically(self.path, "".join(self.path.read_text().splitlines(True)[:first_step]))

    def start_clock(self) -> None:
        """Starts timing a step. The first call also starts the progress bar, to exclude loading and scoring."""
        self.time = time.perf_counter()
        if self.bar is None:
            batch, total = self.args.batch_size, self.args.steps * self.args.batch_size
            few_lines = dict(mininterval=30, maxinterval=math.inf, miniters=total // 50)  # in a log file
            self.bar = tqdm(
                total=total, initial=self.first_step * batch, unit="image", disable=not self.is_rank_zero,
                bar_format="{l_bar}{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
                **(dict(dynamic_ncols=True, mininterval=0.5) if sys.stderr.isatty() else few_lines),
            )  # fmt: skip

    def record(self, loss: torch.Tensor, batch: dict) -> None:
        """Keeps a micro-batch's loss, without the penalty, and the names of its skipped images."""
        self.losses.append(loss.detach())
        self.skipped += batch["unreadable"]
        self.bar.update(len(batch["images"]) * self.processes)

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        """Logs a step before the optimizer takes it, averaged over the processes, with one host–device sync.

        Raises:
            UserError: in every process, if the loss or its gradient is not finite, or if more than one image in ten
                cannot be read.
        """
        mine = sum(self.losses) / len(self.losses)
        sums = torch.stack([mine / self.processes, torch.full_like(grad_norm, len(self.skipped))])
        dist.all_reduce(sums)
        loss, skipped, grad_norm = torch.cat([sums, grad_norm[None]]).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            ranks = [str(rank) for rank, x in enumerate(all_gather_object(float(mine))) if not math.isfinite(x)]
            where = f" (process {', '.join(ranks)})" if ranks else ""
            raise UserError(
                f"step {step}: the loss is {loss} and its gradient's norm {grad_norm}{where}; the step was not taken, "
                f"and the last checkpoint is in {self.args.out}"
            )
        names = sum(all_gather_object(self.skipped), []) if skipped else []
        self.losses, self.skipped = [], []
        self.count_unreadable(step, names)
        now = time.perf_counter()
        speed, self.time = self.args.batch_size / (now - self.time), now
        if self.is_rank_zero:
            line = dict(
                step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_second=round(speed, 3),
                peak_memory_gib=round(peak_memory() / 2**30, 3), unreadable=self.unreadable,
            )  # fmt: skip
            if names:
                line["skipped"] = names
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.estimate(step, now)
        self.bar.set_postfix_str(f"step {step + 1}/{self.args.steps}, loss {loss:.4f}, lr {lr:.1e}", refresh=False)

    def close(self) -> None:
        """Ends the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def count_unreadable(self, step: int, names: list[str]) -> None:
        """Counts unreadable images; warns about the first. UserError: over a tenth of at least 100 reads failed."""
        if names and not self.unreadable:
            warn(f"cannot read {names[0]}: replaced by another image; {self.path} lists all skipped images")
        self.names, self.unreadable = (self.names + names)[:3], self.unreadable + len(names)
        reads = (step + 1) * self.args.batch_size + self.unreadable
        if reads >= 100 and self.unreadable * 10 > reads:
            names = "; ".join(self.names)
            raise UserError(f"step {step}: {self.unreadable} of {reads} images could not be read: {names}")

    def estimate(self, step: int, now: float) -> None:
        """Prints once how long the rest of the run will take, if it is at least half a minute.

        The first step is not timed: it allocates memory and may compile.
        """
        if step == self.first_step:
            self.first_step_end = now
        elif step == self.first_step + TIMED_STEPS:
            steps = self.args.steps - step - 1
            minutes = (now - self.first_step_end) / TIMED_STEPS * steps / 60
            if minutes >= 0.5:
                time_left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
                self.bar.write(f"the remaining {steps:,} steps will take about {time_left}")


def peak_memory() -> int:
    """The peak memory of this process in bytes: on its GPU, or main memory if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB
