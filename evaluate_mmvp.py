"""MMVP-VLM, the benchmark of CLIP-blind pairs, exactly as its authors score it; any number of CLIPs side by side.

    python evaluate_mmvp.py openai-vit-l-14-224 --mmvp MMVP/MMVP_VLM
    python evaluate_mmvp.py openai-vit-l-14-224 runs/l14/clip --mmvp MMVP/MMVP_VLM --out scores

A pair is two images and two statements. CLIP reads "a photo of " + statement, and for each statement a softmax over
the two images must favour the statement's own image; an exact tie goes to the second. A pair counts if both
statements find their image, a type's score is the share of its pairs, the average is over the types. Chance is 25.
Everything is computed in fp32: in fp16 ties make runs differ.

Two readings of an image, for every CLIP by the same rule:

    cls         the class token, which is what `encode_image` returns: the benchmark's own reading
    cls+local   the unit class token plus the mean of all unit local tokens, made unit again

DIVA's released evaluation reads per family: for OpenAI the class token plus the mean of 76 patches drawn at random
anew for each of the two texts, so that a score is a random number; for MetaCLIP and DFN-378 `cls+local`; for DFN-224
and SigLIP `cls`; DFN and SigLIP in fp16. The "before" of the paper's Table 1 is `cls` alone, so its gain mixes the
training's effect with the reading's. Here both readings stand for before and after. The local tokens of a SigLIP are
not in the joint space with the text: its `cls+local` is there for completeness.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from tqdm import tqdm

from condition import visual_tokens
from model import RECIPES, Clip, brief, load_clip, locate_clip, one_sentence, recipe_of, write_whole

torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, which CUDA's convolutions are not by default
READINGS = ("cls", "cls+local")
TYPES = ["Orientation", "Presence", "State", "Quantity", "Spatial", "Color"]
TYPES += ["Structural Character", "Text", "Camera Perspective"]
BASELINES = {  # the untouched CLIPs by type as published, in percent, in the order of TYPES
    "openai-vit-l-14-224": [13.3, 13.3, 20.0, 20.0, 13.3, 53.3, 20.0, 6.7, 13.3],
    "openai-vit-l-14-336": [0.0, 20.0, 40.0, 20.0, 6.7, 20.0, 33.3, 6.7, 33.3],
    "metaclip-vit-l-14-224": [13.3, 6.7, 66.7, 6.7, 33.3, 46.7, 20.0, 6.7, 13.3],
    "metaclip-vit-h-14-224": [6.7, 13.3, 60.0, 13.3, 6.7, 53.3, 26.7, 13.3, 33.3],
    "siglip-so400m-14-224": [26.7, 20.0, 53.3, 40.0, 20.0, 66.7, 40.0, 20.0, 53.3],
    "siglip-so400m-14-384": [20.0, 26.7, 60.0, 33.3, 13.3, 66.7, 33.3, 26.7, 53.3],
    "dfn-vit-h-14-224": [20.0, 26.7, 73.3, 26.7, 26.7, 66.7, 46.7, 13.3, 53.3],
    "dfn-vit-h-14-378": [13.3, 20.0, 53.3, 33.3, 26.7, 66.7, 40.0, 20.0, 40.0],
}
IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")


@dataclass(frozen=True)
class Pair:
    """Two images and their statements; `ids` and `type` as in the CSV."""

    ids: tuple[str, str]
    type: str
    statements: tuple[str, str]
    images: tuple[Path, Path]


def read_mmvp(source: str) -> list[Pair]:
    """Reads a benchmark in MMVP-VLM's layout, from a folder or the hub's data set `source`.

    The layout: Questions.csv with the header `Question ID,Type,Statement`, two rows a pair, and the images of both at
    `MLLM_VLM Images/<Type>/<Question ID>.jpg`. Types and pairs are whatever the CSV holds.

    Raises:
        SystemExit: anything that does not fit, with file and row.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.count("/") != 1 or source.startswith((".", "/")):
            raise SystemExit(f"{source}: no such folder; --mmvp takes a folder or the hub's data set MMVP/MMVP_VLM")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, repo_type="dataset"))
        except Exception as error:  # the hub's client raises many kinds
            raise SystemExit(f"data set {source} could not be fetched from the hub: {brief(error)}") from error
    questions = folder / "Questions.csv"
    root = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if root is None:
        raise SystemExit(f"{folder}: no image folder ({', '.join(IMAGE_FOLDERS)})")
    try:
        with open(questions, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{questions}: cannot be read ({brief(error)})") from None
    if not rows or rows[0][1] != ["Question ID", "Type", "Statement"]:
        raise SystemExit(f"{questions}, row 1: the header must be Question ID,Type,Statement")
    for number, row in rows[1:]:
        if len(row) != 3 or not all(row):
            raise SystemExit(f"{questions}, row {number}: needs an id, a type and a statement")
        if not row[0].isascii() or not row[0].isdigit() or len(row[0]) > 18:
            raise SystemExit(f"{questions}, row {number}: the id {row[0][:20]!r} is not a number of at most 18 digits")
        if len(row[1].encode()) > 255:
            raise SystemExit(f"{questions}, row {number}: the type is longer than a folder's name can be")
    if len(rows) < 3 or len(rows) % 2 == 0:
        raise SystemExit(f"{questions}, row {rows[-1][0]}: rows come in pairs, and this one has no partner")
    pairs, seen = [], set()
    for (number, (id1, type1, statement1)), (number2, (id2, type2, statement2)) in zip(rows[1::2], rows[2::2]):
        if int(id1) % 2 == 0 or int(id1) in seen:
            raise SystemExit(f"{questions}, row {number}: a pair begins with an odd id of its own, and this is {id1}")
        seen.add(int(id1))
        if int(id2) != int(id1) + 1:
            raise SystemExit(f"{questions}, row {number2}: id {id2} does not follow its partner's, {id1}")
        if type1 != type2:
            raise SystemExit(f"{questions}, row {number2}: type {type2!r} differs from its partner's, {type1!r}")
        folders = [root / name for name in (type1, type1.replace(" ", "_"), type1.replace("_", " "))]
        place = next((f for f in folders if f.is_dir()), None)
        if place is None or type1.startswith(".") or "/" in type1 or "\\" in type1:  # none, or not one of the root's
            raise SystemExit(f"{questions}, row {number}: type {type1!r} has no folder in {root}")
        images = (place / f"{id1}.jpg", place / f"{id2}.jpg")
        for image, row in zip(images, (number, number2)):
            if not image.is_file():
                raise SystemExit(f"{questions}, row {row}: no such image: {image}")
        pairs.append(Pair((id1, id2), type1.replace("_", " "), (statement1, statement2), images))
    return pairs


def similarities(clip: Clip, pairs: list[Pair], device, batch_size: int = 32, progress: bool = True) -> np.ndarray:
    """Cosines of statements and images within each pair, in fp32: (readings, pairs, 2 statements, 2 images)."""
    tokenizer, preprocess, model = clip.tokenizer(), clip.preprocess(), clip.model.to(device)
    statements = ["a photo of " + s for pair in pairs for s in pair.statements]
    paths = [path for pair in pairs for path in pair.images]
    images, texts = [], []

    def read(path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return preprocess(image)
        except Exception as error:  # Pillow raises almost any exception on a broken file
            raise SystemExit(f"{path}: not a readable image ({brief(error)})") from None

    bar = tqdm(total=2 * len(paths), desc="MMVP-VLM", unit="encoding", disable=not progress, leave=False, delay=1)
    with torch.inference_mode(), bar, ThreadPoolExecutor() as pool:  # a GPU encodes faster than one core reads
        for start in range(0, len(paths), batch_size):
            batch = list(pool.map(read, paths[start : start + batch_size]))
            cls, local = visual_tokens(model.visual, torch.stack(batch).to(device))  # (B, D), (B, P, D)
            cls = normalize(cls, dim=-1)
            both = normalize(cls + normalize(local, dim=-1).mean(1), dim=-1)
            images.append(torch.stack([cls, both]))  # (readings, B, D)
            tokens = tokenizer(statements[start : start + batch_size]).to(device)
            texts.append(model.encode_text(tokens, normalize=True))
            bar.update(2 * len(batch))
        images = torch.cat(images, 1).unflatten(1, (-1, 2))  # (readings, pairs, 2, D)
        texts = torch.cat(texts).unflatten(0, (-1, 2))  # (pairs, 2, D)
        return torch.einsum("psd,rpid->rpsi", texts, images).cpu().numpy()


def pairs_right(cosines: np.ndarray, scale: float = 100.0) -> np.ndarray:
    """The benchmark's rule: (..., 2 statements, 2 images) cosines → which pairs count, (...) bool.

    The softmax over the two images of scale · cosine must be above 0.5 for the first statement's first image, and must
    not be for the second statement's: an exact tie goes to the second image.
    """
    logits = np.float32(scale) * cosines.astype(np.float32)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    first = exp[..., 0] / exp.sum(-1) > 0.5  # (..., 2): which statements choose the first image
    return first[..., 0] & ~first[..., 1]


def type_names(types: list[str]) -> list[str]:
    """The types that occur, the paper's nine first and in its order, then others as they come."""
    return [t for t in TYPES if t in types] + [t for t in dict.fromkeys(types) if t not in TYPES]


def type_scores(values: np.ndarray, types: list[str]) -> dict[str, float]:
    """The mean of a value per pair within each type, in percent."""
    return {name: 100 * float(values[np.array(types) == name].mean()) for name in type_names(types)}


def average(values: np.ndarray, types: list[str]) -> float:
    """The benchmark's figure: the mean of the types' scores, in percent."""
    return float(np.mean(list(type_scores(values, types).values())))


def interval(values: np.ndarray, types: list[str], draws: int = 10_000) -> tuple[float, float]:
    """The 95% interval of `average`: a seeded bootstrap over pairs, drawn within each type; in percentage points.

    `values` is one number a pair: right or wrong, or the change between two CLIPs (-1, 0 or 1).
    """
    rng = np.random.default_rng(0)
    groups = [values[np.array(types) == name].astype(float) for name in type_names(types)]
    means = [rng.choice(group, (draws, len(group))).mean(1) for group in groups]
    low, high = np.percentile(100 * np.mean(means, axis=0), [2.5, 97.5]).round(6) + 0.0  # no -0.0
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided McNemar p-value: `won` pairs against `lost` ones, were each as likely as the other."""
    n, k = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def table(names: list[str], cosines: list[np.ndarray], pairs: list[Pair], recipes: list[str | None]) -> str:
    """The scores as text: types as rows; a column for each CLIP and reading, and for the paper's figures where known.

    Args:
        names: one for each CLIP.
        cosines: for each CLIP (readings, pairs, 2, 2), from `similarities`.
        pairs: from `read_mmvp`.
        recipes: for each CLIP the recipe that it is, if it is one: its published scores get a column.
    """
    types = [pair.type for pair in pairs]
    head, columns, intervals = [], [], []
    for k, (clip_cosines, recipe) in enumerate(zip(cosines, recipes), start=1):
        for reading, right in zip(READINGS, pairs_right(clip_cosines)):
            head.append(f"{k} {reading}")
            columns.append([*type_scores(right, types).values(), average(right, types)])
            intervals.append("{:.1f}–{:.1f}".format(*interval(right, types)))
        if recipe in BASELINES and type_names(types) == TYPES:
            head.append(f"{k} paper")
            columns.append([*BASELINES[recipe], RECIPES[recipe].published[0]])
            intervals.append("")
    rows = [*type_names(types), "average"]
    first = max(len(row) for row in (*rows, "95% interval"))
    widths = [max(len(h), len(i), 5) for h, i in zip(head, intervals)]
    blocks = []
    for start in range(0, len(head), 6):  # columns that fit a terminal
        part = slice(start, start + 6)
        lines = ["".ljust(first) + "".join("  " + h.rjust(w) for h, w in zip(head[part], widths[part]))]
        for r, row in enumerate(rows):
            scores = (f"{column[r]:.1f}".rjust(w) for column, w in zip(columns[part], widths[part]))
            lines.append("  ".join([row.ljust(first), *scores]))
        lines.insert(-1, "-" * len(lines[0]))
        ends = (i.rjust(w) for i, w in zip(intervals[part], widths[part]))
        blocks.append("\n".join([*lines, "  ".join(["95% interval".ljust(first), *ends])]))
    return "\n\n".join(["\n".join(f"{k}: {name}" for k, name in enumerate(names, start=1)), *blocks])


def change(before: np.ndarray, after: np.ndarray, pairs: list[Pair]) -> list[dict]:
    """The paired change between two CLIPs, for each reading: points, their 95% interval, pairs won and lost, p."""
    types, changes = [pair.type for pair in pairs], []
    for reading, a, b in zip(READINGS, pairs_right(before), pairs_right(after)):
        won, lost = int((b & ~a).sum()), int((a & ~b).sum())
        difference = b.astype(int) - a.astype(int)
        low, high = interval(difference, types)
        row = dict(reading=reading, points=average(difference, types), low=low, high=high)
        changes.append(row | dict(won=won, lost=lost, p=mcnemar(won, lost)))
    return changes


def change_lines(changes: list[dict]) -> str:
    """`change` in words, a line for each reading."""
    return "\n".join(
        "{reading:10} {points:+.1f} points (95% interval {low:+.1f} … {high:+.1f}), {won} pairs won, {lost} lost, "
        "exact McNemar p = {p:.2g}".format(**c)
        for c in changes
    )


def save_scores(folder: str | os.PathLike, names: list[str], cosines: list[np.ndarray], pairs: list[Pair]) -> None:
    """Writes pairs.csv, a row for each pair and CLIP with its four cosines and outcome per reading, and scores.json."""
    folder, types = Path(folder), [pair.type for pair in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    scores, rows = [], []
    for name, clip_cosines in zip(names, cosines):
        entry = dict(clip=name)
        for reading, right in zip(READINGS, pairs_right(clip_cosines)):
            low, high = interval(right, types)
            entry[reading] = dict(average=average(right, types), low=low, high=high, types=type_scores(right, types))
        scores.append(entry)
        for p, pair in enumerate(pairs):
            row = dict(clip=name, type=pair.type, id1=pair.ids[0], id2=pair.ids[1])
            row |= dict(statement1=pair.statements[0], statement2=pair.statements[1])
            for reading, cosine in zip(READINGS, clip_cosines[:, p]):
                row |= {f"{reading} s{s + 1} i{i + 1}": f"{cosine[s, i]:.7f}" for s in (0, 1) for i in (0, 1)}
                row[f"{reading} right"] = int(pairs_right(cosine))
            rows.append(row)
    for entry, clip_cosines in zip(scores[1:], cosines[1:]):
        entry["change"] = change(cosines[0], clip_cosines, pairs)  # from the first
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    content = json.dumps(dict(pairs=len(pairs), clips=scores), indent=2) + "\n"
    write_whole(folder / "scores.json", content)  # last: it says that the run was evaluated


def report(names: list[str], cosines: list[np.ndarray], pairs: list[Pair], recipes: list[str | None]) -> str:
    """The table, the change from the first CLIP to each other one, and what the paper reports for the recipe."""
    parts = [table(names, cosines, pairs, recipes)]
    for k, other in enumerate(cosines[1:], start=2):
        parts.append(f"change from 1 to {k}:\n" + change_lines(change(cosines[0], other, pairs)))
    for recipe in dict.fromkeys(r for r in recipes if r in BASELINES and type_names([p.type for p in pairs]) == TYPES):
        parts.append("the paper (Table 1), {}: {:.1f} → {:.1f}".format(recipe, *RECIPES[recipe].published))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="MMVP-VLM scores of any number of CLIPs, side by side.",
        epilog="A CLIP is a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder saved by a run. "
        "Recipes: " + ", ".join(RECIPES) + ".",
    )
    parser.error = sys.exit  # a sentence, without the usage in front of it
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="the CLIPs to evaluate")
    parser.add_argument(
        "--mmvp", default="MMVP/MMVP_VLM", metavar="PATH", help="the hub's data set, or a folder (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="write scores.json and pairs.csv there")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default: %(default)s)")
    args = parser.parse_args()
    for name in args.clips:
        locate_clip(name)
    if args.batch_size < 1:
        raise SystemExit("--batch-size: must be at least 1")
    pairs = read_mmvp(args.mmvp)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cosines = [similarities(load_clip(name), pairs, device, args.batch_size) for name in args.clips]
    recipes = [recipe_of(name) for name in args.clips]
    print(report(args.clips, cosines, pairs, recipes))
    if args.out:
        save_scores(args.out, args.clips, cosines, pairs)
        print(f"\nwritten: {args.out}/scores.json, {args.out}/pairs.csv")


if __name__ == "__main__":
    with one_sentence("evaluate_mmvp.py"):
        main()
