"""What in the method carries the effect, measured on the miniature: train.py itself, row by row, over seeds.

    python miniature/experiment.py                                               # every row of ROWS, five seeds
    python miniature/experiment.py --rows "as the recipe" "no penalty" --seeds 1 2 3
    python miniature/experiment.py --rows "another CLIP*"                        # needs the folder `other`: see make.py
    python miniature/experiment.py --rows "paper, *" --seeds 0 --pairs-seed 31 --out runs/choose        # the grid

A row has a name and flags of train.py. Each CLIP is measured on 3,600 pairs and 3,000 pictures that no training has
seen, and compared with the untouched CLIP. Finished runs are kept in OUT and not repeated. Choose settings with
`--pairs-seed 31`, and report them on the default pairs (seed 20).

The table gives, for each row, the mean over its seeds: the change of the pair score in points for both embeddings, ±
its standard error over pairs and, for several seeds, ± over seeds; the change of zero-shot class accuracy in points;
the training loss over the first and the last tenth of the steps that train CLIP. A second table gives the change of
`cls` by type.

`--flags` adds the same flags to all rows, such as `--flags "--clip second/clip --diffusion second/diffusion --data
second/images.tar"` for a second world.
"""

from __future__ import annotations

import argparse
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.options import parse_args
from harness.recipes import RECIPES

PAPER, OTHER, STEPS = "--recipe miniature-paper", "--diffusion other/diffusion", RECIPES["miniature"].steps
CONTROL = "another image"  # rows that end with this use the condition of the previous image of the batch
ROWS = {
    "as the recipe": "",
    "as the recipe, another image": "",
    "no penalty": "--ldifs 0",
    "t uniform": "--timesteps 0:1000",
    "SGD": "--optimizer sgd --lr 0.3",
    "layer trained along": "--no-freeze-projection",
    "layer random, trained along": "--projection random --no-freeze-projection",
    "class token alone": "--recap none",
    "all patches": "--recap all",
    "900 steps at 1e-3": "--steps 900 --lr 1e-3",
    "twice the steps": f"--steps {2 * STEPS}",
    "twice the steps, another image": f"--steps {2 * STEPS}",
    "four times the steps": f"--steps {4 * STEPS}",
    "right captions": None,  # no feedback: models.learn_captions
    "the paper's recipe": PAPER,
}
OTHER_PHI = {
    "another CLIP's φ": OTHER,
    "another CLIP's φ, another image": OTHER,
    "another CLIP's φ, layer trained along": f"{OTHER} --no-freeze-projection",
    "another CLIP's φ, layer random, trained along": f"{OTHER} --projection random --no-freeze-projection",
}
RATES = {"sgd": ("5e-6", "5e-5", "5e-4", "5e-3"), "adamw": ("1e-6", "1e-5", "1e-4", "1e-3")}
CHANGES = {
    "": "",
    ", warm-up 3%": "--warmup 0.03",
    ", layer alone first": "--projection-steps 200 --projection-lr 1e-2 --steps 1100",
    ", recap none": "--recap none",
    ", recap all": "--recap all",
    ", 3600 steps": "--steps 3600",
}
GRID = {
    f"paper, {optimizer} {rate}{name}": f"{PAPER} --optimizer {optimizer} --lr {rate} {flags}"
    for optimizer, rates in RATES.items()
    for rate in rates
    for name, flags in CHANGES.items()
}
ALL = ROWS | OTHER_PHI | GRID


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What in the method carries the effect, row by row, over seeds.")
    parser.error = usage_error
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names or patterns such as 'paper, sgd *' (ROWS)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N", help="(%(default)s)")
    parser.add_argument("--flags", default="", metavar="FLAGS", help="flags of train.py for all rows, in one string")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="pairs of each type (%(default)s)")
    parser.add_argument("--pairs-seed", type=int, default=20, metavar="N", help="seed of the pairs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once, a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    rows = []
    for pattern in args.rows or ROWS:
        found = [row for row in ALL if fnmatchcase(row, pattern)]
        if not found:
            raise UserError(f"--rows {pattern}: no such row; the rows are {'; '.join(ALL)}")
        rows += [row for row in found if row not in rows]
    args.rows = rows
    if args.pairs < 1 or args.jobs < 1 or min(args.seeds) < 0:
        raise UserError("--pairs and --jobs must be at least 1, --seeds 0 or more")
    if not {*OTHER_PHI}.isdisjoint(rows) and not Path("other/diffusion").is_dir():
        raise UserError("other/diffusion: not found; make it as the docstring of make.py says")
    for row in rows:
        run_settings(row, 0, args.flags, args.out)  # raises what train.py would raise, before any run
    return args


def run_settings(row: str, seed: int, flags: str, out: Path) -> argparse.Namespace:
    """train.py's settings for one run. UserError: train.py refuses the flags."""
    row_flags = (ALL[row] or "").split()
    fixed = ["--seed", str(seed), "--workers", "0", "--mmvp", "none", "--out", str(out / f"{row}-{seed}")]
    return parse_args([*row_flags, *flags.split(), *fixed])


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("experiment.py"):
        args = read_args()

import contextlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import train
from evaluate_mmvp import pairs_right, similarities
from harness.mmvp import read_mmvp
from harness.processes import process_group
from harness.scores import type_names, type_scores
from miniature.claims import markdown
from miniature.gates import unseen_accuracy
from miniature.models import DEVICE, learn_captions, pool
from miniature.world import write_mmvp
from model import load_clip


def measure(folder: str, mmvp: str) -> dict:
    """A CLIP on what no training has seen: pairs right (embeddings, pairs), and class accuracy in percent."""
    clip = load_clip(folder, device=str(DEVICE))
    right = pairs_right(similarities(clip, read_mmvp(mmvp), DEVICE, batch_size=250, progress=False))
    return dict(right=right.astype(int).tolist(), accuracy=unseen_accuracy(clip))


def run(row: str, seed: int, flags: str, out: Path) -> None:
    """One training and its measurement, written to OUT/ROW-SEED.json."""
    torch.set_num_threads(1)
    settings = run_settings(row, seed, flags, out)
    folder = Path(settings.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if row == "right captions":
            clip = load_clip(settings.clip, device=str(DEVICE))
            learn_captions(clip.model, *pool(4000, 100 + seed), seed)
            clip.save(folder / "clip")
            losses = []
        else:
            losses = train_with_feedback(row, settings)
    found = measure(f"{folder}/clip", f"{out}/mmvp")
    tenth = max(1, len(losses) // 10)
    found["loss"] = [float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]) if part]
    (out / f"{row}-{seed}.json").write_text(json.dumps(found))
    shutil.rmtree(folder)


def train_with_feedback(row: str, settings: argparse.Namespace) -> list[float]:
    """Runs train.py, and returns the losses of the steps that train CLIP."""
    loss = train.denoising_loss
    if row.endswith(CONTROL):
        train.denoising_loss = lambda diffusion, latents, condition, *drawn: loss(
            diffusion, latents, condition.roll(1, 0), *drawn
        )
    with process_group() as device:
        train.train(settings, device)
    train.denoising_loss = loss
    losses = [json.loads(line)["loss"] for line in Path(settings.out, "metrics.jsonl").read_text().splitlines()]
    return losses[settings.projection_steps :]


def table(rows: list[str], seeds: list[int], out: Path) -> str:
    """The finished runs as two tables in Markdown: all figures, and the change of `cls` by type."""
    before = json.loads((out / "before.json").read_text())
    right = np.array(before["right"])
    types = [pair.type for pair in read_mmvp(f"{out}/mmvp")]
    untouched = [f"{score:.1f}" for score in type_scores(right[0], types).values()]
    lines, by_type = [["row", "seeds", "cls", "cls+local", "class", "loss"]], [["cls", *type_names(types)]]
    by_type.append(["untouched", *untouched])
    for row in rows:
        runs = [json.loads(p.read_text()) for seed in seeds if (p := out / f"{row}-{seed}.json").exists()]
        if not runs:
            continue
        change = 100 * (np.array([r["right"] for r in runs]) - right)  # (seeds, embeddings, pairs), in points
        cells = []
        for embedding in change.transpose(1, 0, 2):
            over_pairs = embedding.mean(0).std() / embedding.shape[1] ** 0.5
            cell = f"{embedding.mean():+.2f} ± {over_pairs:.2f}"
            if len(runs) > 1:
                cell += f" ± {embedding.mean(1).std(ddof=1) / len(runs) ** 0.5:.2f}"
            cells.append(cell)
        cells.append(f"{np.mean([r['accuracy'] for r in runs]) - before['accuracy']:+.1f}")
        cells.append(" → ".join(f"{loss:.4f}" for loss in np.mean([r["loss"] for r in runs], axis=0)))
        lines.append([row, str(len(runs)), *cells])
        scores = type_scores(change[:, 0].mean(0) / 100, types).values()
        by_type.append([row, *(f"{score:+.1f}" for score in scores)])
    cls, local = (f"{100 * embedding.mean():.1f}" for embedding in right)
    header = f"untouched: cls {cls}, cls+local {local}, class {before['accuracy']:.1f}"
    return "\n\n".join([header, markdown(lines), markdown(by_type)])


def write_benchmark(args: argparse.Namespace) -> None:
    """Writes OUT's pairs, and measures the untouched CLIP. UserError: OUT has other pairs or flags."""
    of = dict(pairs=args.pairs, pairs_seed=args.pairs_seed, flags=args.flags)
    file = args.out / "before.json"
    if file.exists():
        there = json.loads(file.read_text()).get("of")
        if there != of:
            raise UserError(f"--out {args.out}: measured with {there}, not {of}; name another folder")
        return
    shutil.rmtree(args.out / "mmvp", ignore_errors=True)
    (args.out / "mmvp").mkdir(parents=True)
    write_mmvp(args.out / "mmvp", args.pairs, args.pairs_seed)
    clip = run_settings("as the recipe", 0, args.flags, args.out).clip
    file.write_text(json.dumps(measure(clip, f"{args.out}/mmvp") | dict(of=of)))


def main(args: argparse.Namespace) -> None:
    write_benchmark(args)
    todo = [(r, s) for s in args.seeds for r in args.rows if not (args.out / f"{r}-{s}.json").exists()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as workers:
        done = [workers.submit(run, row, seed, args.flags, args.out) for row, seed in todo]
        for one in tqdm(done, desc="runs", unit="run"):
            one.result()
    print(table(args.rows, args.seeds, args.out))


if __name__ == "__main__":
    with exit_on_user_error("experiment.py"):
        main(args)
