"""What in the method carries the effect, measured on the miniature: train.py itself, row by row, over seeds.

    python miniature/experiment.py                                                  # every row of ROWS, five seeds
    python miniature/experiment.py --rows "as the recipe" "no pull" --seeds 1 2 3

A row is a name and what it changes in the recipe `miniature`. Each CLIP is measured on pairs and pictures that no
training has seen (3,600 and 3,000), against the untouched one. Runs that are done are kept in OUT and not repeated.
Printed for each row, the mean over its seeds: the change of the pair score in points for both embeddings, ± its
standard error over pairs and, of several seeds, ± over them; the change in points of the zero-shot class accuracy; the
training loss in the first tenth of the steps after the linear layer's own, and in the last. A second table gives the
change of each type's pair score (`cls`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import make
import train
from evaluate_mmvp import pairs_right, similarities
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.mmvp import read_mmvp
from harness.options import parse_args
from harness.processes import process_group
from harness.recipes import MINIATURE
from harness.scores import type_names, type_scores
from model import load_clip

PAPER = "--recipe miniature-paper"
ROWS = {  # what each changes in the recipe
    "as the recipe": "",
    "as the recipe, another image": "",  # the control: each image is judged by the condition of the one before it
    "no pull": "--ldifs 0",
    "t uniform": "--timesteps 0:1000",
    "SGD, lr 0.3": "--optimizer sgd --lr 0.3",
    "layer trained along": "--no-freeze-projection",
    "layer random, trained along": "--projection random --no-freeze-projection",
    "layer random, 200 steps alone first": "--projection random --projection-steps 200 --projection-lr 1e-2 "
    "--steps 1100",
    "class token alone": "--recap none",
    "all patches": "--recap all",
    "twice the steps": "--steps 1800",
    "twice the steps, another image": "--steps 1800",
    "the paper's way": PAPER,  # its rate is 5.1e-4
    "the paper's way, lr 0.03": f"{PAPER} --lr 0.03",
    "right captions": None,  # no feedback: make.learn_captions
}


def measure(folder: str, mmvp: str) -> dict:
    """A CLIP on what no training has seen: pairs right (embeddings, pairs), and class accuracy in percent."""
    clip = load_clip(folder, device=str(make.DEVICE))
    right = pairs_right(similarities(clip, read_mmvp(mmvp), make.DEVICE, batch_size=250, progress=False))
    return dict(right=right.astype(int).tolist(), accuracy=make.unseen(clip)[2])


def run(row: str, seed: int, out: Path) -> None:
    """One training and its measurement, into OUT/ROW-SEED.json."""
    torch.set_num_threads(1)
    work = out / f"{row}-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with open(work / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if row == "right captions":
            clip = load_clip(f"{MINIATURE}/clip", device=str(make.DEVICE))
            make.learn_captions(clip.model, *make.pool(4000, 100 + seed), seed)
            (work / "clip").mkdir()
            clip.save(work / "clip")
            losses = []
        else:
            losses = feedback(row, seed, work)
    found = measure(f"{work}/clip", f"{out}/mmvp")
    tenth = max(1, len(losses) // 10)
    found["loss"] = [float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]) if part]
    (out / f"{row}-{seed}.json").write_text(json.dumps(found))
    shutil.rmtree(work)


def feedback(row: str, seed: int, work: Path) -> list[float]:
    """Runs train.py with a row's options, and returns the losses of the steps that train CLIP."""
    flags = ["--seed", str(seed), "--workers", "0", "--mmvp", "none", "--out", str(work)]
    args = parse_args([*ROWS[row].split(), *flags])
    loss = train.denoising_loss
    if row.endswith("another image"):
        train.denoising_loss = lambda diffusion, latents, condition, *drawn: loss(
            diffusion, latents, condition.roll(1, 0), *drawn
        )
    with process_group() as device:
        train.train(args, device)
    train.denoising_loss = loss
    losses = [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    return losses[args.projection_steps :]


def table(rows: list[str], seeds: list[int], out: Path) -> str:
    """The rows that are measured, as two tables in Markdown."""
    before = json.loads((out / "before.json").read_text())
    right = np.array(before["right"])
    types = [pair.type for pair in read_mmvp(f"{out}/mmvp")]
    untouched = type_scores(right[0], types)
    by_type = [
        "| cls | " + " | ".join(type_names(types)) + " |",
        "|---" * (1 + len(untouched)) + "|",
        "| untouched | " + " | ".join(f"{score:.1f}" for score in untouched.values()) + " |",
    ]
    lines = [
        f"untouched: cls {100 * right[0].mean():.1f}, cls+local {100 * right[1].mean():.1f}, class "
        f"{before['accuracy']:.1f}",
        "",
        "| row | seeds | cls | cls+local | class | loss |",
        "|---|---|---|---|---|---|",
    ]
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
        lines.append(f"| {row} | {len(runs)} | " + " | ".join(cells) + " |")
        scores = type_scores(change[:, 0].mean(0) / 100, types).values()
        by_type.append(f"| {row} | " + " | ".join(f"{score:+.1f}" for score in scores) + " |")
    return "\n".join([*lines, "", *by_type])


def benchmark(out: Path, pairs: int) -> None:
    """OUT's pairs, `pairs` of each type, and what the untouched CLIP makes of them. UserError: OUT has others."""
    if (out / "before.json").exists():
        there = len(json.loads((out / "before.json").read_text())["right"][0]) // len(make.DETAILS)
        if there != pairs:
            raise UserError(f"--pairs {pairs}: {out} was measured with {there} of each type; name another --out")
        return
    shutil.rmtree(out / "mmvp", ignore_errors=True)
    (out / "mmvp").mkdir(parents=True)
    make.write_mmvp(out / "mmvp", pairs, seed=20)
    (out / "before.json").write_text(json.dumps(measure(f"{MINIATURE}/clip", f"{out}/mmvp")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage_error
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="which; all, if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="of each type, to measure with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once, a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), metavar="DIR")
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS:
            raise UserError(f"--rows {row}: no such row; there are {', '.join(ROWS)}")
    benchmark(args.out, args.pairs)
    todo = [(r, s) for s in args.seeds for r in args.rows if not (args.out / f"{r}-{s}.json").exists()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as workers:
        done = [workers.submit(run, row, seed, args.out) for row, seed in todo]
        for one in tqdm(done, desc="runs", unit="run"):
            one.result()
    print(table(args.rows, args.seeds, args.out))


if __name__ == "__main__":
    with exit_on_user_error("experiment.py"):
        main()
