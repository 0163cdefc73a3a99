"""MMVP-VLM, the benchmark of CLIP-blind pairs (arXiv 2401.06209), for any number of CLIPs side by side, in fp32.

    python evaluate_mmvp.py openai-vit-l-14-224 --mmvp MMVP/MMVP_VLM
    python evaluate_mmvp.py openai-vit-l-14-224 runs/l14/clip --mmvp MMVP/MMVP_VLM --out scores

A pair has two images and two statements. It counts if each statement is closer to its own image than to the other one
(`pairs_right`). The score of a type is the share of its pairs that count; the average is taken over the types. Chance
is 25. The released evaluation computes some CLIPs in fp16, where ties make the score vary.

An image is embedded in two ways:

    cls         the class token, as `encode_image` returns it: the benchmark's own
    cls+local   the unit class token plus the mean of the unit patch tokens, normalized

`--released` adds the embedding that DIVA's released evaluation uses for each CLIP (`embed_released`). In the paper's
Table 1, "after" uses it but "before" uses `cls`, so five of the eight gains mix training with a change of embedding.
"""

from __future__ import annotations

from harness.errors import UserError, exit_on_user_error
from harness.evaluate import read_args, save_scores, warn_of_limits

if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("evaluate_mmvp.py"):
        args = read_args()

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from condition import visual_tokens
from harness.mmvp import Pair, read_mmvp
from harness.precision import full_fp32
from harness.recipes import BASELINES, RECIPES, TYPES, recipe_of
from harness.scores import average, draws_in_words, interval, paired_change, scores, table, type_names, verdict
from model import Clip, load_clip

EMBEDDINGS = ("cls", "cls+local")
DRAWS = 100  # of a random embedding (`embed_released`)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def pairs_right(cosines: np.ndarray) -> np.ndarray:
    """The benchmark's rule: (..., 2 statements, 2 images) cosines → which pairs count, (...) bool.

    Each statement chooses the first image if a softmax of 100 · cosine over the two images gives that image more than
    0.5. A pair counts if the first statement chooses the first image and the second does not. So a tie goes to the
    second image.
    """
    logits = np.float32(100) * cosines.astype(np.float32)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    first = exp[..., 0] / exp.sum(-1) > 0.5  # (..., 2): which statements choose the first image
    return first[..., 0] & ~first[..., 1]


def embed_images(cls: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Class tokens (B, D) and patch tokens (B, P, D) → the embeddings `cls` and `cls+local`, (2, B, D), unit length.

    The sum is normalized because its length differs between images: the longer embedding would win both statements. On
    the miniature, normalizing changes about 170 of 900 pairs: 72 of them are right only with it, 98 only without it.
    """
    cls = normalize(cls, dim=-1)
    return torch.stack([cls, normalize(cls + normalize(local, dim=-1).mean(1), dim=-1)])


def read_pictures(clip: Clip, paths: Sequence, batch_size: int, progress: bool = True) -> Iterator[torch.Tensor]:
    """The images as CLIP's input, in batches (B, 3, s, s). UserError: an image cannot be read."""
    options = dict(unit=f"{batch_size} images", leave=False, delay=1)
    options["disable"] = None if progress else True  # None: no progress bar in a log file
    with ThreadPoolExecutor() as pool:  # a GPU encodes faster than one core reads
        for start in tqdm(range(0, len(paths), batch_size), **options):
            yield torch.stack(list(pool.map(clip.preprocess_file, paths[start : start + batch_size])))


def encode_pairs(
    clip: Clip, pairs: list[Pair], device, batch_size: int = 32, progress: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Encodes the benchmark in batches of p pairs. Moves CLIP to `device`.

    Yields the images' class tokens (2p, D) and patch tokens (2p, P, D), pair by pair, and the statements' embeddings
    (p, 2, D), unit length.

    Raises:
        UserError: an image cannot be read, or this CLIP has no tokenizer.
    """
    tokenizer, model, per_batch = clip.tokenizer(), clip.model.to(device), max(1, batch_size // 2)
    batches = [pairs[start : start + per_batch] for start in range(0, len(pairs), per_batch)]
    paths = [path for pair in pairs for path in pair.images]
    for images, batch in zip(read_pictures(clip, paths, 2 * per_batch, progress), batches):
        cls, local = visual_tokens(model.visual, images.to(device))
        statements = ["a photo of " + statement for pair in batch for statement in pair.statements]
        texts = model.encode_text(tokenizer(statements).to(device), normalize=True).unflatten(0, (-1, 2))
        yield cls, local, texts


@torch.inference_mode()
def similarities(
    clip: Clip, pairs: list[Pair], device, batch_size: int = 32, progress: bool = True, released: str | None = None
) -> np.ndarray:
    """Cosines of statements and images within each pair, in fp32: (embeddings, pairs, 2 statements, 2 images).

    `released` is a `kind` of `embed_released`; its draws follow the two embeddings.

    Raises:
        UserError: as `encode_pairs`, or the embeddings are not finite.
    """
    warn_of_limits(clip, pairs)
    rng, cosines = np.random.default_rng(0), []
    with full_fp32():
        for cls, local, texts in encode_pairs(clip, pairs, device, batch_size, progress):
            embeddings = embed_images(cls, local)[:, None].expand(-1, 2, -1, -1)  # the same for both statements
            if released:
                embeddings = torch.cat([embeddings, embed_released(released, cls, local, rng)])
            embeddings = embeddings.unflatten(2, (-1, 2))  # (embeddings, 2 statements, pairs, 2 images, D)
            cosines.append(torch.einsum("psd,kspid->kpsi", texts, embeddings).cpu())
    cosines = torch.cat(cosines, 1).numpy()
    if not np.isfinite(cosines).all():
        raise UserError(f"{clip.source}: its embeddings are not finite; its weights are broken")
    return cosines


# ---------------------------------------------------------------------------------------------------------------------
# The released embedding


def embed_released(
    kind: str, cls: torch.Tensor, local: torch.Tensor, rng: np.random.Generator, draws: int = DRAWS
) -> torch.Tensor:
    """The embedding of DIVA's released evaluation, for each of a pair's two statements: (draws or 1, 2, B, D).

    `kind` is the recipe's `released`: "cls" (DFN at 224, SigLIP) and "cls+local" (MetaCLIP) are as above; "sum" (DFN
    at 378) is cls+local without the last normalization; "random:76" (OpenAI) is the class token plus the mean of 76
    patch tokens, neither normalized before the sum. These are drawn with replacement for each image and statement, so
    the score is random.
    """
    if kind == "sum":
        both = normalize(cls, dim=-1) + normalize(local, dim=-1).mean(1)
        return both.expand(1, 2, -1, -1)
    if kind.startswith("random:"):
        count = int(kind.removeprefix("random:"))
        patches = rng.integers(local.shape[1], size=(len(local), draws, 2, count))  # image by image, whatever the batch
        patches = torch.from_numpy(patches).permute(1, 2, 0, 3).to(local.device)  # (draws, 2, B, count)
        ones = torch.ones_like(patches, dtype=local.dtype)
        counts = ones.new_zeros(*patches.shape[:3], local.shape[1]).scatter_add_(-1, patches, ones)  # of each patch
        return normalize(cls + torch.einsum("ksbp,bpd->ksbd", counts / count, local), dim=-1)
    return embed_images(cls, local)[EMBEDDINGS.index(kind)].expand(1, 2, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(
    names: list[str],
    cosines: list[np.ndarray],
    pairs: list[Pair],
    folder: str | os.PathLike | None = None,
    kinds: list[str] | None = None,
) -> str:
    """The scores of each CLIP, and the change from the first CLIP to each other one, as text.

    Args:
        names: the CLIPs; a recipe's CLIP is shown beside the paper's figures.
        cosines: for each CLIP, from `similarities`.
        folder: where scores.json and pairs.csv are written, if anywhere.
        kinds: for each CLIP, the `kind` of `embed_released` whose draws follow the two embeddings in `cosines`.
    """
    types, recipes = [pair.type for pair in pairs], [recipe_of(name) for name in names]
    outcomes = [pairs_right(clip_cosines) for clip_cosines in cosines]  # each (2 embeddings and all draws, pairs) bool
    rights = [dict(zip(EMBEDDINGS, outcome)) for outcome in outcomes]
    changes = [paired_change(rights[0], other, types) for other in rights[1:]]
    clips = [dict(clip=name) | scores(right, types) for name, right in zip(names, rights)]
    for clip, lines, outcome in zip(clips, [[], *changes], outcomes):
        clip.update(change=lines, released=[average(right, types) for right in outcome[2:]])  # one for each draw
    if folder:
        save_scores(Path(folder), clips, cosines, rights, pairs)

    drawn = []
    if kinds:
        drawn = [outcome[2:].mean(0) for outcome in outcomes]  # each (pairs,), the mean over draws
        rights = [right | dict(released=mean) for right, mean in zip(rights, drawn)]
    parts = ["\n".join(f"{k}: {name}" for k, name in enumerate(names, start=1)), table(rights, recipes, types)]
    for k, (clip, kind) in enumerate(zip(clips, kinds or []), start=1):
        parts.append(f"{k} released ({kind}): {draws_in_words(clip['released'])}")
    for k, lines in enumerate(changes, start=2):
        words = [f"change from 1 to {k}:", *(verdict(line, len(pairs)) for line in lines)]
        if kinds:
            change = drawn[k - 1] - drawn[0]
            figures = average(change, types), *interval(change, types)
            words.append("Released, mean of draws: {:+.1f} points (95% interval {:+.1f} … {:+.1f}).".format(*figures))
        parts.append("\n".join(words))
    for recipe in dict.fromkeys(recipes):
        if recipe in BASELINES and type_names(types) == TYPES:
            parts.append("the paper (Table 1), {}: {:.1f} → {:.1f}".format(recipe, *RECIPES[recipe].published))
    return "\n\n".join(parts)


def main(args: argparse.Namespace) -> None:
    pairs, cosines = read_mmvp(args.mmvp), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, kind in zip(args.clips, args.kinds or [None] * len(args.clips)):
        cosines.append(similarities(load_clip(name), pairs, device, args.batch_size, released=kind))
    print(compare(args.clips, cosines, pairs, args.out, args.kinds))
    if args.out:
        print(f"\nwritten: {args.out}/scores.json, {args.out}/pairs.csv")


if __name__ == "__main__":
    with exit_on_user_error("evaluate_mmvp.py"):
        main(args)
