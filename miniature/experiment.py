"""Ablations on the miniature: the gain without each part of the method. Each row is trained with several seeds.

    python miniature/experiment.py                                          # all rows, five seeds
    python miniature/experiment.py --rows "as the recipe" "no penalty --recap none" --seeds 1 2 3
    python miniature/experiment.py --seeds 0 --pairs-seed 31 --out runs/choose \\
        --rows "the paper's recipe --lr "{5e-6,5e-5,5e-4}{," --recap all"}  # a grid: bash expands the braces
    python miniature/experiment.py --rows "as the recipe*" --flags "--diffusion ./other/diffusion" --out runs/other

A row is a name in ROWS or a pattern of names; flags of train.py may follow it. Each trained CLIP is tested on 3,600
unseen pairs and 3,000 unseen pictures, and compared with the untouched CLIP. Results are kept in OUT, and finished runs
are not repeated. Choose settings with `--pairs-seed 31`, and report them on the default pairs (seed 20).

For each row the table shows means over its seeds: the change of the pair score in points for both embeddings, ± its
standard error over pairs and, for several seeds, ± over seeds; the change of zero-shot class accuracy in points; the
training loss over the first and the last tenth of the steps that train CLIP. A second table shows the change of `cls`
by type.

`--flags` adds flags to all rows. It may choose another diffusion model, as above, or another CLIP, such as
`--flags "--clip second/clip --diffusion ./second/diffusion --data second/images.tar"` for a second world.
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

STEPS = RECIPES["miniature"].steps
CAPTIONS = "full captions"  # trained on captions, without φ, in batches of 256: models.learn_captions
CONTROL = "another image"  # rows with this in their name use the condition of the previous image of the batch
ROWS = {
    "as the recipe": "",
    "as the recipe, another image": "",
    "no penalty": "--ldifs 0",
    "t from 0": "--timesteps 0:1000",
    "SGD": "--optimizer sgd --lr 0.3",
    "layer not frozen": "--no-freeze-projection",
    "layer random, not frozen": "--projection random --no-freeze-projection",
    "class token alone": "--recap none",
    "all patches": "--recap all",
    "twice the steps": f"--steps {2 * STEPS}",
    "four times the steps": f"--steps {4 * STEPS}",
    "four times the steps, class token alone": f"--steps {4 * STEPS} --recap none",
    CAPTIONS: "--steps 100",
    "the paper's recipe": "--recipe miniature-paper",
}


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `rows` maps each row to all its flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage_error
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names or patterns; flags of train.py may follow")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N", help="(%(default)s)")
    parser.add_argument("--flags", default="", metavar="FLAGS", help="flags of train.py for all rows, in one string")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="pairs of each type (%(default)s)")
    parser.add_argument("--pairs-seed", type=int, default=20, metavar="N", help="seed of the pairs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once, a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.jobs < 1 or min(args.seeds) < 0:
        raise UserError("--pairs and --jobs must be at least 1, --seeds 0 or more")
    asked, args.rows = args.rows or list(ROWS), {}
    for row in asked:
        pattern, dashes, more = row.partition(" --")
        names = [name for name in ROWS if fnmatchcase(name, pattern)]
        if not names:
            raise UserError(f"--rows {row}: no such row; the rows are {'; '.join(ROWS)}")
        for name in names:
            full_name = (name + dashes + more).replace("/", ":")  # it becomes part of a file name
            args.rows[full_name] = f"{ROWS[name]}{dashes}{more} {args.flags}"
    for row, flags in args.rows.items():
        run_settings(row, flags, 0, args.out)  # refuse bad flags before any run
    return args


def run_settings(row: str, flags: str, seed: int, out: Path) -> argparse.Namespace:
    """train.py's settings for one run. UserError: train.py refuses the flags."""
    fixed = ["--seed", str(seed), "--workers", "0", "--mmvp", "none", "--out", str(out / f"{row}-{seed}")]
    return parse_args([*flags.split(), *fixed])


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("experiment.py"):
        args = read_args()

import contextlib
import json
import multiprocessing
import shutil
from collections.abc import Iterable
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
from train import denoising_loss


def measure(folder: str, mmvp: str) -> dict:
    """Tests a CLIP on unseen data: pairs right (embeddings, pairs), and class accuracy in percent."""
    clip = load_clip(folder, device=str(DEVICE))
    right = pairs_right(similarities(clip, read_mmvp(mmvp), DEVICE, batch_size=250, progress=False))
    return dict(right=right.astype(int).tolist(), accuracy=unseen_accuracy(clip))


def run(row: str, flags: str, seed: int, out: Path) -> None:
    """Trains a CLIP, tests it, and writes OUT/ROW-SEED.json."""
    torch.set_num_threads(1)
    settings, losses = run_settings(row, flags, seed, out), []
    folder = Path(settings.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if row.startswith(CAPTIONS):
            clip = load_clip(settings.clip, device=str(DEVICE))
            learn_captions(clip.model, *pool(4000, 100 + seed), seed, settings.steps)
            clip.save(folder / "clip")
        else:
            train.denoising_loss = loss_of_another_image if CONTROL in row else denoising_loss
            with process_group() as device:
                train.train(settings, device)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in lines[settings.projection_steps :]]  # those that train CLIP
    found = measure(f"{folder}/clip", f"{out}/mmvp")
    tenth = max(1, len(losses) // 10)
    found["loss"] = [float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]) if part]
    (out / f"{row}-{seed}.json").write_text(json.dumps(found))
    shutil.rmtree(folder)


def loss_of_another_image(diffusion, latents, condition, *drawn) -> torch.Tensor:
    """train.py's loss with the condition of the previous image of the batch."""
    return denoising_loss(diffusion, latents, condition.roll(1, 0), *drawn)


def table(rows: Iterable[str], seeds: list[int], out: Path) -> str:
    """The finished runs as two tables in Markdown: all figures, and the change of `cls` by type."""
    before = json.loads((out / "before.json").read_text())
    right, types = np.array(before["right"]), [pair.type for pair in read_mmvp(f"{out}/mmvp")]
    lines = [["row", "seeds", "cls", "cls+local", "class", "loss"]]
    by_type = [["cls", *type_names(types)]]
    by_type.append(["untouched", *(f"{score:.1f}" for score in type_scores(right[0], types).values())])
    for row in rows:
        runs = [json.loads(p.read_text()) for seed in seeds if (p := out / f"{row}-{seed}.json").exists()]
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
        by_type.append([row, *(f"{s:+.1f}" for s in type_scores(change[:, 0].mean(0) / 100, types).values())])
    cls, local = (f"{100 * embedding.mean():.1f}" for embedding in right)
    header = f"untouched: cls {cls}, cls+local {local}, class {before['accuracy']:.1f}"
    return "\n\n".join([header, markdown(lines), markdown(by_type)])


def write_benchmark(args: argparse.Namespace) -> None:
    """Writes OUT's pairs, and tests the untouched CLIP. UserError: OUT has other pairs or flags."""
    of = dict(pairs=args.pairs, pairs_seed=args.pairs_seed, flags=args.flags)
    file = args.out / "before.json"
    if file.exists():
        there = json.loads(file.read_text())["of"]
        if there != of:
            raise UserError(f"--out {args.out}: measured with {there}, not {of}; choose another folder")
        return
    shutil.rmtree(args.out / "mmvp", ignore_errors=True)
    (args.out / "mmvp").mkdir(parents=True)
    write_mmvp(args.out / "mmvp", args.pairs, args.pairs_seed)
    clip = run_settings("", args.flags, 0, args.out).clip
    file.write_text(json.dumps(measure(clip, f"{args.out}/mmvp") | dict(of=of)))


def main(args: argparse.Namespace) -> None:
    write_benchmark(args)
    todo = [(row, seed) for seed in args.seeds for row in args.rows if not (args.out / f"{row}-{seed}.json").exists()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as workers:
        done = [workers.submit(run, row, args.rows[row], seed, args.out) for row, seed in todo]
        for one in tqdm(done, desc="runs", unit="run"):
            one.result()
    print(table(args.rows, args.seeds, args.out))


if __name__ == "__main__":
    with exit_on_user_error("experiment.py"):
        main(args)
