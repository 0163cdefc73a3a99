"""MMVP-VLM, the benchmark of CLIP-blind pairs, by its authors' rule, in fp32; any number of CLIPs side by side.

    python evaluate_mmvp.py openai-vit-l-14-224 --mmvp MMVP/MMVP_VLM
    python evaluate_mmvp.py openai-vit-l-14-224 runs/l14/clip --mmvp MMVP/MMVP_VLM --out scores

A pair is two images and two statements. CLIP reads "a photo of " + statement, and for each statement a softmax over
the two images must favour the statement's own image; an exact tie goes to the second. A pair counts if both
statements find their image, a type's score is the share of its pairs, the average is over the types. Chance is 25.
Everything is computed in fp32: in fp16 ties make runs differ.

Two embeddings of an image, for every CLIP by the same rule:

    cls         the class token, which is what `encode_image` returns: the benchmark's own
    cls+local   the unit class token plus the mean of all unit local tokens, made unit again

DIVA's released evaluation differs per family: for OpenAI the class token plus the mean of 76 patches drawn at random
anew for each of the two texts, so that a score is a random number; for MetaCLIP `cls+local`; for DFN-378 the same, but
the sum is not made unit again; for DFN-224 and SigLIP `cls`; DFN and SigLIP in fp16. The "before" of the paper's Table
1 is `cls` alone, so its gain mixes the training's effect with the embedding's. Here both embeddings stand for before
and after. The local tokens of a SigLIP are not in the joint space with the text: its `cls+local` is there for
completeness.

Why the sum is made unit again: its length differs from image to image, and the longer of two images would gain for both
statements, where a pair needs one statement for each image. On the miniature 170 of 900 pairs come out otherwise
without it, 72 for the unit sum and 98 against it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from tqdm import tqdm

from condition import visual_tokens
from harness.errors import UserError, brief, fail, one_sentence
from harness.files import check_writable, write_whole
from harness.mmvp import Pair, read_mmvp
from harness.recipes import BASELINES, RECIPES, TYPES, locate_clip, recipe_of, split_weights
from model import Clip, load_clip

torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, which CUDA's convolutions are not by default
EMBEDDINGS = ("cls", "cls+local")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark: two embeddings of an image, and the rule


def embed_images(visual: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The two embeddings, `cls` and `cls+local`, of preprocessed images (B, 3, s, s): (2, B, D), each of length 1."""
    cls, local = visual_tokens(visual, images)  # (B, D), (B, P, D)
    cls = normalize(cls, dim=-1)
    return torch.stack([cls, normalize(cls + normalize(local, dim=-1).mean(1), dim=-1)])


def pairs_right(cosines: np.ndarray) -> np.ndarray:
    """The benchmark's rule: (..., 2 statements, 2 images) cosines → which pairs count, (...) bool.

    The softmax over the two images of 100 · cosine must be above 0.5 for the first statement's first image, and must
    not be for the second statement's: an exact tie goes to the second image.
    """
    logits = np.float32(100) * cosines.astype(np.float32)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    first = exp[..., 0] / exp.sum(-1) > 0.5  # (..., 2): which statements choose the first image
    return first[..., 0] & ~first[..., 1]


def similarities(clip: Clip, pairs: list[Pair], device, batch_size: int = 32, progress: bool = True) -> np.ndarray:
    """Cosines of statements and images within each pair, in fp32: (embeddings, pairs, 2 statements, 2 images).

    Raises:
        UserError: an image cannot be read, or this CLIP has no tokenizer.
    """
    tokenizer, preprocess, model = clip.tokenizer(), clip.preprocess(), clip.model.to(device)
    statements = ["a photo of " + s for pair in pairs for s in pair.statements]
    paths = [path for pair in pairs for path in pair.images]
    images, texts = [], []

    def read(path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return preprocess(image)
        except Exception as error:  # Pillow raises almost any exception on a broken file
            raise UserError(f"{path}: not a readable image ({brief(error)})") from None

    bar = tqdm(total=2 * len(paths), desc="MMVP-VLM", unit="encoding", disable=not progress, leave=False, delay=1)
    with torch.inference_mode(), bar, ThreadPoolExecutor() as pool:  # a GPU encodes faster than one core reads
        for start in range(0, len(paths), batch_size):
            batch = list(pool.map(read, paths[start : start + batch_size]))
            images.append(embed_images(model.visual, torch.stack(batch).to(device)))
            tokens = tokenizer(statements[start : start + batch_size]).to(device)
            texts.append(model.encode_text(tokens, normalize=True))
            bar.update(2 * len(batch))
        images = torch.cat(images, 1).unflatten(1, (-1, 2))  # (embeddings, pairs, 2, D)
        texts = torch.cat(texts).unflatten(0, (-1, 2))  # (pairs, 2, D)
        return torch.einsum("psd,epid->epsi", texts, images).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Scores, their intervals, and the change between two CLIPs


def type_names(types: list[str]) -> list[str]:
    """The types that occur, the paper's nine first and in its order, then others as they come."""
    return [t for t in TYPES if t in types] + [t for t in dict.fromkeys(types) if t not in TYPES]


def type_scores(values: np.ndarray, types: list[str]) -> dict[str, float]:
    """The mean of a value per pair within each type, in percent."""
    return {name: 100 * float(values[np.array(types) == name].mean()) for name in type_names(types)}


def average(values: np.ndarray, types: list[str]) -> float:
    """The benchmark's figure: the mean of the types' scores, in percent."""
    return float(np.mean(list(type_scores(values, types).values())))


def interval(values: np.ndarray, types: list[str]) -> tuple[float, float]:
    """The 95% interval of `average`: a seeded bootstrap over pairs, drawn within each type; in percentage points.

    `values` is one number a pair: right or wrong, or the change between two CLIPs (-1, 0 or 1).
    """
    rng = np.random.default_rng(0)
    groups = [values[np.array(types) == name].astype(float) for name in type_names(types)]
    means = [rng.choice(group, (10_000, len(group))).mean(1) for group in groups]
    low, high = np.percentile(100 * np.mean(means, axis=0), [2.5, 97.5]).round(6) + 0.0  # no -0.0
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided McNemar p-value: `won` pairs against `lost` ones, were each as likely as the other."""
    n, k = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def scores(cosines: np.ndarray, types: list[str]) -> dict[str, dict]:
    """A CLIP's scores, for each embedding: the average, its interval (low, high), and the types'; in percent."""
    found = {}
    for embedding, right in zip(EMBEDDINGS, pairs_right(cosines)):
        low, high = interval(right, types)
        found[embedding] = dict(average=average(right, types), low=low, high=high, types=type_scores(right, types))
    return found


def table(names: list[str], cosines: list[np.ndarray], pairs: list[Pair], recipes: list[str | None]) -> str:
    """The scores as text: types as rows; a column for each CLIP and embedding, and for the paper's figures where known.

    Args:
        names: one for each CLIP.
        cosines: for each CLIP (embeddings, pairs, 2, 2), from `similarities`.
        pairs: from `read_mmvp`.
        recipes: for each CLIP the recipe that it is, if it is one: its published scores get a column.
    """
    types = [pair.type for pair in pairs]
    rows, columns = ["", *type_names(types), "average", "95% interval"], []
    for k, (clip_cosines, recipe) in enumerate(zip(cosines, recipes), start=1):
        for embedding, score in scores(clip_cosines, types).items():
            values = [*score["types"].values(), score["average"]]
            interval_text = f"{score['low']:.1f}–{score['high']:.1f}"
            columns.append([f"{k} {embedding}", *(f"{value:.1f}" for value in values), interval_text])
        if recipe in BASELINES and type_names(types) == TYPES:
            values = [*BASELINES[recipe], RECIPES[recipe].published[0]]
            columns.append([f"{k} paper", *(f"{value:.1f}" for value in values), ""])
    blocks = ["\n".join(f"{k}: {name}" for k, name in enumerate(names, start=1))]
    for start in range(0, len(columns), 6):  # as many as fit a terminal
        lines = ["".join(cells) for cells in zip(*map(aligned, [rows, *columns[start : start + 6]]))]
        lines.insert(-2, "-" * len(lines[0]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def aligned(cells: list[str]) -> list[str]:
    """A column of text in its own width: names at the left, figures at the right, two spaces between columns."""
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells] if not cells[0] else [cell.rjust(width + 2) for cell in cells]


def change(before: np.ndarray, after: np.ndarray, pairs: list[Pair]) -> list[dict]:
    """The paired change between two CLIPs, for each embedding: points, their 95% interval, pairs won and lost, p."""
    types, changes = [pair.type for pair in pairs], []
    for embedding, a, b in zip(EMBEDDINGS, pairs_right(before), pairs_right(after)):
        won, lost = int((b & ~a).sum()), int((a & ~b).sum())
        difference = b.astype(int) - a.astype(int)
        low, high = interval(difference, types)
        row = dict(embedding=embedding, points=average(difference, types), low=low, high=high)
        changes.append(row | dict(won=won, lost=lost, p=mcnemar(won, lost)))
    return changes


def change_lines(changes: list[dict]) -> str:
    """`change` in words, a line for each embedding."""
    return "\n".join(
        "{embedding:10} {points:+.1f} points (95% interval {low:+.1f} … {high:+.1f}), pairs won {won}, lost {lost}, "
        "exact McNemar p = {p:.2g}".format(**c)
        for c in changes
    )


def verdict(changes: list[dict], pairs: int) -> str:
    """What `change` found on this many pairs, a sentence for each outcome: which embedding, how much, how sure.

    A gain or a loss needs an interval that leaves out zero and p < 0.05. Without them, the sentence says the smallest
    change that would show: the outcome is inconclusive if the interval still holds it, and no effect is seen if not.
    """
    found = {}
    for c in changes:
        changed = max(c["won"] + c["lost"], 6)  # five pairs are too few: 5 won and 0 lost have p = 0.06
        lost = next(n for n in range(changed // 2, -1, -1) if mcnemar(changed - n, n) < 0.05)
        visible = 100 * (changed - 2 * lost) / pairs  # points
        if c["p"] < 0.05 and not c["low"] <= 0 <= c["high"]:
            outcome = "A gain" if c["points"] > 0 else "A loss"
        elif visible > 100 or max(-c["low"], c["high"]) >= visible:
            outcome = "Inconclusive"
        else:
            outcome = "No effect seen"
        found.setdefault(outcome, []).append(c | dict(visible=visible))
    figures, sentences = "{points:+.1f} points (95% interval {low:+.1f} … {high:+.1f}, p = {p:.2g})", []
    for outcome, same in sorted(found.items()):  # a gain or a loss first
        sentence = f"{outcome} in {' and '.join(c['embedding'] for c in same)}: "
        sentence += " and ".join(figures.format(**c) for c in same)
        visible = max(c["visible"] for c in same)
        if outcome in ("Inconclusive", "No effect seen") and visible <= 100:
            sentence += f"; with {pairs} pairs, only a change of about {visible:.1f} points or more would show"
        elif outcome == "Inconclusive":
            sentence += f"; {pairs} pairs are too few to show any change"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def save_scores(folder: str | os.PathLike, names: list[str], cosines: list[np.ndarray], pairs: list[Pair]) -> None:
    """Writes scores.json, and pairs.csv: for each CLIP and pair the four cosines and the outcome, per embedding."""
    folder, types = Path(folder), [pair.type for pair in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    entries, rows = [], []
    for name, clip_cosines in zip(names, cosines):
        entries.append(dict(clip=name) | scores(clip_cosines, types))
        for p, pair in enumerate(pairs):
            row = dict(clip=name, type=pair.type, id1=pair.ids[0], id2=pair.ids[1])
            row |= dict(statement1=pair.statements[0], statement2=pair.statements[1])
            for embedding, cosine in zip(EMBEDDINGS, clip_cosines[:, p]):
                row |= {f"{embedding} s{s + 1} i{i + 1}": f"{cosine[s, i]:.7f}" for s in (0, 1) for i in (0, 1)}
                row[f"{embedding} right"] = int(pairs_right(cosine))
            rows.append(row)
    for entry, clip_cosines in zip(entries[1:], cosines[1:]):
        entry["change"] = change(cosines[0], clip_cosines, pairs)  # from the first
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    content = json.dumps(dict(pairs=len(pairs), clips=entries), indent=2) + "\n"
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
        epilog="A CLIP is a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder saved by a run. CLIP@WEIGHTS "
        "is one with the weights of a file in place of its own. Recipes: " + ", ".join(RECIPES) + ".",
    )
    parser.error = fail
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="the CLIPs to evaluate")
    mmvp = "the hub's data set, or a folder (default: MMVP/MMVP_VLM, or a recipe's own)"
    parser.add_argument("--mmvp", metavar="PATH", help=mmvp)
    parser.add_argument("--out", metavar="DIR", help="write scores.json and pairs.csv there")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default: %(default)s)")
    args = parser.parse_args()
    for name in args.clips:
        locate_clip(name)
    if args.batch_size < 1:
        raise UserError("--batch-size: must be at least 1")
    if args.out:
        check_writable(args.out, "--out")
    recipes = [recipe_of(name) for name in args.clips]
    own = [recipe_of(split_weights(name)[0]) for name in args.clips]
    own = [RECIPES[recipe].mmvp for recipe in own if recipe and RECIPES[recipe].mmvp]
    pairs = read_mmvp(args.mmvp or (own or ["MMVP/MMVP_VLM"])[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cosines = [similarities(load_clip(name), pairs, device, args.batch_size) for name in args.clips]
    print(report(args.clips, cosines, pairs, recipes))
    if args.out:
        save_scores(args.out, args.clips, cosines, pairs)
        print(f"\nwritten: {args.out}/scores.json, {args.out}/pairs.csv")


if __name__ == "__main__":
    with one_sentence("evaluate_mmvp.py"):
        main()
