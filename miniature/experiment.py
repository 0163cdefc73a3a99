"""What matters in the method, measured on the miniature: train.py itself, row by row, over seeds.

    python miniature/experiment.py                                 # every row of ROWS, five seeds
    python miniature/experiment.py --rows fitted "recap all" --seeds 0 1 2

A row is a name and what it changes in the recipe `miniature`. Each run is measured on 3,600 pairs and 3,000 pictures
that no training has seen, against the untouched CLIP; runs that are done are kept in OUT and not repeated. Printed for
each row, the mean over its seeds: the change of the pair score in points for both readings, ± its standard error over
pairs and ± over seeds; the change in points of the zero-shot class accuracy and of a linear probe of the nine details
on the image embedding; the change of the training loss from the first tenth of the steps to the last. A second table
gives the change of each type's pair score (`cls`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import make
import train
from evaluate_mmvp import pairs_right, read_mmvp, similarities, type_names, type_scores
from model import MINIATURE, load_clip, one_sentence

FITTED = ["--projection", "fitted"]
ROWS = {  # what each changes in the recipe
    "as the recipe": [],
    "lr 1e-4, as published": ["--lr", "1e-4"],
    "lr 0.03": ["--lr", "0.03"],
    "recap none": ["--recap", "none"],
    "recap all": ["--recap", "all"],
    "another image": [],  # control: each image is judged by the condition of the batch's next one
    "fitted": FITTED,
    "fitted, another image": FITTED,
    "fitted, 200 steps": [*FITTED, "--steps", "200"],
    "fitted, recap none": [*FITTED, "--recap", "none"],
    "fitted, recap none, another image": [*FITTED, "--recap", "none"],
    "fitted, recap none, lr 0.03": [*FITTED, "--recap", "none", "--lr", "0.03"],
    "fitted, recap all": [*FITTED, "--recap", "all"],
    "fitted, linear layer frozen": [*FITTED, "--freeze-projection"],
    "linear layer frozen": ["--freeze-projection"],
    "N = 1": ["--states", "1"],
    "N = 4": ["--states", "4"],
    "text joins by position": ["--join", "positions"],
}


def measure(folder: str, mmvp: str) -> dict:
    """A CLIP on what no training has seen: pairs right (readings, pairs), class accuracy, the probe of each detail."""
    clip = load_clip(folder, device=str(make.DEVICE))
    right = pairs_right(similarities(clip, read_mmvp(mmvp), make.DEVICE, batch_size=250, progress=False))
    scenes, embeddings, accuracy = make.unseen(clip)
    probe = make.probe(embeddings, scenes, 2000, penalty=0.01)
    return dict(right=right.astype(int).tolist(), accuracy=accuracy, probe=probe)


def run(row: str, seed: int, out: Path) -> None:
    """One run of train.py and its measurement, into OUT/ROW-SEED.json."""
    torch.set_num_threads(max(1, torch.get_num_threads() // JOBS))
    work = out / f"{row}-{seed}"
    flags = list(ROWS[row])
    loss = train.denoising_loss
    if "another image" in row:  # each image is judged by the condition of its neighbour in the batch
        train.denoising_loss = lambda diffusion, latents, condition, *drawn: loss(
            diffusion, latents, condition.roll(1, 0), *drawn
        )
    args = train.parse_args([*flags, "--seed", str(seed), "--workers", "0", "--out", str(work), "--overwrite"])
    args.mmvp = None
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train.train(args)
    train.denoising_loss = loss
    found = measure(f"{work}/clip", f"{out}/mmvp")
    losses = [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(losses) // 10)
    found["loss"] = [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))]
    (out / f"{row}-{seed}.json").write_text(json.dumps(found))
    shutil.rmtree(work)


def table(rows: list[str], seeds: list[int], out: Path) -> str:
    """The rows that are measured, as two tables."""
    before = json.loads((out / "before.json").read_text())
    right = np.array(before["right"])
    types = [pair.type for pair in read_mmvp(f"{out}/mmvp")]
    by_type = [
        "| cls | " + " | ".join(type_names(types)) + " |",
        "|---" * (1 + len(type_names(types))) + "|",
        "| untouched | " + " | ".join(f"{score:.1f}" for score in type_scores(right[0], types).values()) + " |",
    ]
    lines = [
        f"untouched: cls {100 * right[0].mean():.1f}, cls+local {100 * right[1].mean():.1f}, class "
        f"{before['accuracy']:.1f}, probe {np.mean(before['probe']):.1f}",
        "",
        "| row | seeds | cls | cls+local | class | probe | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [json.loads(p.read_text()) for seed in seeds if (p := out / f"{row}-{seed}.json").exists()]
        if not runs:
            continue
        change = 100 * (np.array([r["right"] for r in runs]) - right)  # (seeds, readings, pairs), in points
        cells = []
        for reading in change.transpose(1, 0, 2):
            over_pairs = reading.mean(0).std() / reading.shape[1] ** 0.5
            over_seeds = reading.mean(1).std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else float("nan")
            cells.append(f"{reading.mean():+.2f} ± {over_pairs:.2f} ± {over_seeds:.2f}")
        cells.append(f"{np.mean([r['accuracy'] for r in runs]) - before['accuracy']:+.1f}")
        cells.append(f"{np.mean([r['probe'] for r in runs]) - np.mean(before['probe']):+.1f}")
        cells.append(f"{np.mean([r['loss'][1] - r['loss'][0] for r in runs]):+.4f}")
        lines.append(f"| {row} | {len(runs)} | " + " | ".join(cells) + " |")
        scores = type_scores(change[:, 0].mean(0) / 100, types).values()
        by_type.append(f"| {row} | " + " | ".join(f"{score:+.1f}" for score in scores) + " |")
    return "\n".join([*lines, "", *by_type])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="which; all, if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="of each type, to measure with")
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), metavar="DIR")
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS:
            raise SystemExit(f"--rows {row}: no such row; there are {', '.join(ROWS)}")
    if not (args.out / "before.json").exists():
        (args.out / "mmvp").mkdir(parents=True, exist_ok=True)
        make.write_mmvp(args.out / "mmvp", args.pairs, seed=20)
        (args.out / "before.json").write_text(json.dumps(measure(f"{MINIATURE}/clip", f"{args.out}/mmvp")))
    todo = [(r, s) for s in args.seeds for r in args.rows if not (args.out / f"{r}-{s}.json").exists()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as workers:
        done = [workers.submit(run, row, seed, args.out) for row, seed in todo]
        for one in tqdm(done, desc="runs", unit="run"):
            one.result()
    print(table(args.rows, args.seeds, args.out))


JOBS = os.cpu_count() or 1

if __name__ == "__main__":
    with one_sentence("experiment.py"):
        main()
