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

Why the sum is made unit again: its length differs from image to image. Without it, the longer of two embeddings wins
both statements, where a pair needs one statement for each image. On the miniature the two ways disagree about 170 of
900 pairs: of these the unit sum has 72 right, the other 98. The local tokens of a SigLIP are not in the joint space
with the text: its `cls+local` is there for completeness.

`--released` adds DIVA's own reading, by which the paper's "after" was scored. It differs per family (`embed_released`).
The "before" of the paper's Table 1 is `cls` alone, so its gain mixes the training's effect with the embedding's. For
OpenAI's CLIPs the reading draws patches at random: its score is a random number, here given over 100 draws.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from condition import visual_tokens
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.files import check_writable, write_atomically
from harness.mmvp import Pair, read_mmvp
from harness.recipes import BASELINES, RECIPES, TYPES, locate_clip, recipe_of, split_weights
from harness.scores import average, draws_in_words, paired_change, scores, table, type_names, verdict
from model import Clip, load_clip

EMBEDDINGS = ("cls", "cls+local")
DRAWS = 100  # of a random reading


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark: two embeddings of an image, and the rule


def embed_images(cls: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The two embeddings, `cls` and `cls+local`, of class tokens (B, D) and local tokens (B, P, D): (2, B, D), unit."""
    cls = normalize(cls, dim=-1)
    return torch.stack([cls, normalize(cls + normalize(local, dim=-1).mean(1), dim=-1)])


def embed_released(
    reading: str, cls: torch.Tensor, local: torch.Tensor, rng: np.random.Generator, draws: int = DRAWS
) -> torch.Tensor:
    """The embedding of DIVA's released evaluation, for each of a pair's two statements: (draws or 1, 2, B, D).

    `reading` is that of a recipe: "cls" (DFN-224 and SigLIP) and "cls+local" (MetaCLIP) as above; "sum", the latter
    without making the sum unit (DFN-378); "random:76", the class token plus the mean of 76 local tokens, neither of
    them unit before the sum, drawn with replacement anew for each image and statement (OpenAI).
    """
    if reading == "sum":
        both = normalize(cls, dim=-1) + normalize(local, dim=-1).mean(1)
        return both.expand(1, 2, -1, -1)
    if reading.startswith("random:"):
        count = int(reading.removeprefix("random:"))
        patches = rng.integers(local.shape[1], size=(len(local), draws, 2, count))  # image by image, whatever the batch
        patches = torch.from_numpy(patches).permute(1, 2, 0, 3).to(local.device)  # (draws, 2, B, count)
        ones = torch.ones_like(patches, dtype=local.dtype)
        counts = ones.new_zeros(*patches.shape[:3], local.shape[1]).scatter_add_(-1, patches, ones)  # of each patch
        return normalize(cls + torch.einsum("ksbp,bpd->ksbd", counts / count, local), dim=-1)
    return embed_images(cls, local)[EMBEDDINGS.index(reading)].expand(1, 2, -1, -1)


def pairs_right(cosines: np.ndarray) -> np.ndarray:
    """The benchmark's rule: (..., 2 statements, 2 images) cosines → which pairs count, (...) bool.

    The softmax over the two images of 100 · cosine must be above 0.5 for the first statement's first image, and must
    not be for the second statement's: an exact tie goes to the second image.
    """
    logits = np.float32(100) * cosines.astype(np.float32)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    first = exp[..., 0] / exp.sum(-1) > 0.5  # (..., 2): which statements choose the first image
    return first[..., 0] & ~first[..., 1]


def similarities(
    clip: Clip, pairs: list[Pair], device, batch_size: int = 32, progress: bool = True, released: str | None = None
) -> np.ndarray:
    """Cosines of statements and images within each pair, in fp32: (embeddings, pairs, 2 statements, 2 images).

    With `released`, a reading of `embed_released`, its draws follow the two embeddings. The CLIP is moved to `device`.

    Raises:
        UserError: an image cannot be read, this CLIP has no tokenizer, or its embeddings are not finite.
    """
    tokenizer, model = clip.tokenizer(), clip.model.to(device)
    rng, cosines, per_batch = np.random.default_rng(0), [], max(1, batch_size // 2)
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # CUDA's convolutions take it by default
    bar = tqdm(total=len(pairs), desc="MMVP-VLM", unit="pair", disable=not progress, leave=False, delay=1)
    with torch.inference_mode(), no_tf32, bar, ThreadPoolExecutor() as pool:  # a GPU encodes faster than one core reads
        for start in range(0, len(pairs), per_batch):
            batch = pairs[start : start + per_batch]
            images = torch.stack(list(pool.map(clip.preprocess_file, [path for pair in batch for path in pair.images]))).to(device)
            statements = ["a photo of " + statement for pair in batch for statement in pair.statements]
            texts = model.encode_text(tokenizer(statements).to(device), normalize=True).unflatten(0, (-1, 2))
            cls, local = visual_tokens(model.visual, images)  # (B, D), (B, P, D)
            embeddings = embed_images(cls, local)[:, None].expand(-1, 2, -1, -1)  # the same for both statements
            if released:
                embeddings = torch.cat([embeddings, embed_released(released, cls, local, rng)])
            embeddings = embeddings.unflatten(2, (-1, 2))  # (embeddings, 2 statements, pairs, 2 images, D)
            cosines.append(torch.einsum("psd,kspid->kpsi", texts, embeddings).cpu())
            bar.update(len(batch))
    cosines = torch.cat(cosines, 1).numpy()
    if not np.isfinite(cosines).all():
        raise UserError(f"{clip.source}: its embeddings are not finite, so it cannot be scored; its weights are broken")
    return cosines


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(
    names: list[str],
    cosines: list[np.ndarray],
    pairs: list[Pair],
    folder: str | os.PathLike | None = None,
    readings: list[str] | None = None,
) -> str:
    """Each CLIP's scores and the change from the first CLIP to each other one, in words; into `folder` too, if given.

    Args:
        names: one for each CLIP; beside a recipe's stands what the paper reports.
        cosines: for each CLIP, from `similarities`.
        readings: for each CLIP the released reading whose draws follow in its cosines.
    """
    types, recipes = [pair.type for pair in pairs], [recipe_of(name) for name in names]
    outcomes = [pairs_right(clip_cosines) for clip_cosines in cosines]  # each (2 embeddings and all draws, pairs) bool
    rights = [dict(zip(EMBEDDINGS, outcome)) for outcome in outcomes]
    changes = [paired_change(rights[0], other, types) for other in rights[1:]]
    draws = [[average(right, types) for right in outcome[2:]] for outcome in outcomes]
    if folder:
        save_scores(Path(folder), names, cosines, rights, changes, draws, pairs)
    shown = rights
    if readings:
        shown = [right | dict(released=outcome[2:].mean(0)) for right, outcome in zip(rights, outcomes)]
    parts = ["\n".join(f"{k}: {name}" for k, name in enumerate(names, start=1)), table(shown, recipes, types)]
    for k, reading in enumerate(readings or []):
        parts.append(f"{k + 1} released, the reading {reading}: {draws_in_words(draws[k])}")
    for k, lines in enumerate(changes, start=2):
        parts.append("\n".join([f"change from 1 to {k}:", *(verdict(line, len(pairs)) for line in lines)]))
    for recipe in dict.fromkeys(recipes):
        if recipe in BASELINES and type_names(types) == TYPES:
            parts.append("the paper (Table 1), {}: {:.1f} → {:.1f}".format(recipe, *RECIPES[recipe].published))
    return "\n\n".join(parts)


def save_scores(folder: Path, names, cosines, rights, changes, draws, pairs: list[Pair]) -> None:
    """Writes scores.json, and pairs.csv: for each CLIP and pair the four cosines and the outcome, per embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, types = [], [pair.type for pair in pairs]
    for name, clip_cosines, clip_rights in zip(names, cosines, rights):
        for p, pair in enumerate(pairs):
            row = dict(clip=name, type=pair.type, id1=pair.ids[0], id2=pair.ids[1])
            row |= dict(statement1=pair.statements[0], statement2=pair.statements[1])
            for embedding, cosine in zip(EMBEDDINGS, clip_cosines[:, p]):
                row |= {f"{embedding} s{s + 1} i{i + 1}": f"{cosine[s, i]:.7f}" for s in (0, 1) for i in (0, 1)}
                row[f"{embedding} right"] = int(clip_rights[embedding][p])
            rows.append(row)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    clips = [dict(clip=name) | scores(clip_rights, types) for name, clip_rights in zip(names, rights)]
    for clip, lines in zip(clips[1:], changes):
        clip["change"] = lines  # from the first
    for clip, averages in zip(clips, draws):
        clip["released"] = averages  # one for each draw; none without --released
    content = json.dumps(dict(pairs=len(pairs), clips=clips), indent=2) + "\n"
    write_atomically(folder / "scores.json", content)  # last: it says that the run was evaluated


def main() -> None:
    parser = argparse.ArgumentParser(
        description="MMVP-VLM scores of any number of CLIPs, side by side.",
        epilog="A CLIP is a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder saved by a run. CLIP@WEIGHTS "
        "is one with the weights of a file in place of its own. Recipes: " + ", ".join(RECIPES) + ".",
    )
    parser.error = usage_error
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="the CLIPs to evaluate")
    mmvp = "the hub's data set, or a folder (default: MMVP/MMVP_VLM, or a recipe's own)"
    parser.add_argument("--mmvp", metavar="PATH", help=mmvp)
    released = "DIVA's own reading too: that of each CLIP's recipe, or else of RECIPE"
    parser.add_argument("--released", metavar="RECIPE", nargs="?", const="", help=released)
    parser.add_argument("--out", metavar="DIR", help="write scores.json and pairs.csv there")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default: %(default)s)")
    args = parser.parse_args()
    for name in args.clips:
        locate_clip(name)
    if args.batch_size < 1:
        raise UserError("--batch-size: must be at least 1")
    if args.out:
        check_writable(args.out, "--out")
    recipes = [recipe_of(split_weights(name)[0]) for name in args.clips]
    benchmarks = [RECIPES[recipe].mmvp for recipe in recipes if recipe]
    pairs = read_mmvp(args.mmvp or next(filter(None, benchmarks), "MMVP/MMVP_VLM"))
    readings = None
    if args.released is not None:
        other = args.released or next(filter(None, recipes), "")
        if other not in RECIPES:
            raise UserError(f"--released {other}: name the recipe whose reading is meant, of {', '.join(RECIPES)}")
        readings = [RECIPES[recipe or other].released for recipe in recipes]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cosines = []
    for k, name in enumerate(args.clips):
        clip, reading = load_clip(name), readings[k] if readings else None
        cosines.append(similarities(clip, pairs, device, args.batch_size, released=reading))
    print(compare(args.clips, cosines, pairs, args.out, readings))
    if args.out:
        print(f"\nwritten: {args.out}/scores.json, {args.out}/pairs.csv")


if __name__ == "__main__":
    with exit_on_user_error("evaluate_mmvp.py"):
        main()
