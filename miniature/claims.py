"""Tests the four claims of the paper's abstract on unseen scenes, with CLIP before and after training.

    python miniature/claims.py                       # the CLIP of the default run, runs/miniature/clip
    python miniature/claims.py CLIP --before CLIP    # any other CLIP of a miniature

**Fine-grained perception**: the pair score on unseen pairs. **Multimodal language models** read patch tokens: a linear
probe predicts the nine details from the mean patch token and from all tokens; also from the class token, which such
models do not read. **Segmentation**: a linear probe labels each patch token as background or one of the ten classes;
the score is the mean IoU of these eleven. **Zero-shot ability kept**: class accuracy, and the retrieval of one full
caption or picture among all. The paper's figures are of other tasks: compare only whether there is a gain.

The 95% interval of a change is a paired bootstrap over pairs or scenes. A gain "holds" if the interval is above zero,
and "does not hold" if it reaches zero but stays below +1 point. "Kept" holds if the interval stays above −1 point, and
does not hold if it reaches −1 but stays below zero. Otherwise the claim is "not shown".

Seeds of scenes, each used for one thing: --seed + 1 (training the models), 2 (the benchmark), 3 (the images), 10 to 14
(`make.py check`), 20, 31, 100 to 105 (`experiment.py`), 41 to 49 (tests), 60 and 61 (here), 62 and 63 (`keeps.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.recipes import MINIATURE, locate_clip


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage_error
    parser.add_argument("clip", nargs="?", default="runs/miniature/clip", metavar="CLIP", help="trained (%(default)s)")
    parser.add_argument("--before", default=f"{MINIATURE}/clip", metavar="CLIP", help="untouched (%(default)s)")
    args = parser.parse_args(argv)
    if args.clip == parser.get_default("clip") and not Path(args.clip).exists():
        raise UserError(f"{args.clip}: not found; run `python train.py` first, or pass a CLIP")
    for name in (args.before, args.clip):
        locate_clip(name)
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("claims.py"):
        args = read_args()

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from condition import visual_tokens
from evaluate_mmvp import EMBEDDINGS, pairs_right, similarities
from extras.zero_shot import classify
from harness.mmvp import read_mmvp
from harness.scores import bootstrap_means, percentile_interval, type_names
from miniature import world
from miniature.gates import ridge
from miniature.models import DEVICE
from model import Clip, load_clip

KEPT = "zero-shot ability kept"
ROWS = {  # measurement: the claim, and the paper's figure
    "pair score, cls": ("fine-grained perception", "MMVP-VLM 19.3 → 25.9"),
    "pair score, cls+local": ("fine-grained perception", ""),
    "details from the mean patch token": ("multimodal language models", "MMVP 24.7 → 31.3"),
    "details from all tokens": ("multimodal language models", ""),
    "details from the class token": ("for comparison", ""),
    "patches, mean IoU": ("segmentation", "ADE20K 29.2 → 30.2"),
    "class accuracy": (KEPT, "29 sets within ±0.2"),
    "retrieval of full captions": (KEPT, ""),
}
MARGIN = 1.0  # points: the smallest gain that the paper reports


def draw_scenes(count: int, seed: int) -> tuple[np.ndarray, list, np.ndarray]:
    """Distinct scenes (count, 11), their pictures, and the labels of their patches (count, 64).

    A label is 1 + the class if the thing covers half of the patch, else 0.
    """
    scenes = np.unique(world.random_scenes(2 * count, seed), axis=0)  # sorted
    scenes = np.random.default_rng(seed).permutation(scenes)[:count]
    pictures, labels, rng = [], [], np.random.default_rng((seed, 1))
    for scene in tqdm(scenes, desc="draw", unit="scene", leave=False):
        picture, mask = world.draw_with_mask(scene, rng)
        coverage = np.asarray(mask).reshape(8, 8, 8, 8).mean((1, 3)).ravel()  # of each patch, 0 to 255
        pictures.append(picture)
        labels.append(np.where(coverage >= 128, 1 + scene[0], 0))
    return scenes, pictures, np.array(labels)


@torch.no_grad()
def measure(clip: Clip, drawn: tuple, pairs: list, fitted: int) -> dict[str, np.ndarray]:
    """The outcomes of each of ROWS, (pairs or scenes, groups, 2): how many are right, and of how many.

    The probes are fitted to the first `fitted` scenes and tested on the others.
    """
    scenes, pictures, labels = drawn
    rows, types = {}, np.array([pair.type for pair in pairs])
    types = types[:, None] == type_names(types.tolist())  # (pairs, 9)
    for embedding, right in zip(EMBEDDINGS, pairs_right(similarities(clip, pairs, DEVICE, batch_size=250))):
        rows[f"pair score, {embedding}"] = np.stack([types & right[:, None], types], -1)

    batches = torch.stack([clip.preprocess_image(picture) for picture in pictures]).split(250)
    tokens = [visual_tokens(clip.model.visual, b.to(DEVICE)) for b in tqdm(batches, desc="encode", leave=False)]
    cls, local = (torch.cat(parts).cpu() for parts in zip(*tokens))  # (scenes, D), (scenes, 64, D)
    all_tokens = torch.cat([cls[:, None], local], 1)
    features = {"the mean patch token": local.mean(1), "all tokens": all_tokens, "the class token": cls}
    for name, x in features.items():
        right = ridge(x, scenes[:fitted]) == scenes[fitted:]
        rows[f"details from {name}"] = answers(right[:, 2:])

    read = ridge(local.flatten(0, 1), labels[:fitted].reshape(-1, 1)).reshape(-1, labels.shape[1])
    read, true = (np.eye(11, dtype=bool)[patches] for patches in (read, labels[fitted:]))  # (scenes, 64, 11)
    rows["patches, mean IoU"] = np.stack([(read & true).sum(1), (read | true).sum(1)], -1)

    named = classify(clip, batches, world.CLASSES, DEVICE, [world.PREFIX + "the {}"])
    rows["class accuracy"] = answers(named == scenes[:, 0])
    captions = [world.PREFIX + world.caption(scene, [True] * 10) for scene in scenes[fitted:]]
    texts = clip.model.encode_text(clip.tokenizer()(captions).to(DEVICE), normalize=True).cpu()
    cosines = normalize(cls[fitted:], dim=-1) @ texts.T  # (pictures, captions)
    own = torch.arange(len(cosines))
    rows["retrieval of full captions"] = answers(np.stack([cosines.argmax(d) == own for d in (0, 1)], 1))
    return rows


def answers(right: np.ndarray) -> np.ndarray:
    """Single answers, (n,) or (n, groups) bool, as the outcomes of `measure`."""
    right = right.reshape(len(right), -1)
    return np.stack([right, np.ones_like(right)], -1)


def score(outcomes: np.ndarray) -> np.ndarray:
    """The mean of right / all over groups, in percent; `outcomes` (..., groups, 2) are sums or means over scenes."""
    return 100 * (outcomes[..., 0] / outcomes[..., 1]).mean(-1)


def change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """The change of `score` in points, and its 95% interval: a bootstrap that draws the same scenes for both."""
    both = np.stack([before, after], 1)  # (n, 2, groups, 2)
    scores = score(bootstrap_means(both, np.random.default_rng(0), draws=2000))  # (draws, 2)
    points = score(after.sum(0)) - score(before.sum(0))
    return float(points), *percentile_interval(scores[:, 1] - scores[:, 0])


def verdict(kept: bool, low: float, high: float) -> str:
    """Whether a claim holds, by the interval of the change; `kept`: the claim is that nothing is lost."""
    if low > (-MARGIN if kept else 0):
        return "holds" if kept or high >= MARGIN else "holds, by less than a point"
    return "does not hold" if high < (0 if kept else MARGIN) else "not shown"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned in a terminal too; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def table(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str:
    """The claims in Markdown."""
    rows = [["claim", "in the paper", "here, in percent", "before", "after", "change (95% interval)", "verdict"]]
    for name, (claim, paper) in ROWS.items():
        points, low, high = change(before[name], after[name])
        scores = [f"{score(outcomes[name].sum(0)):.1f}" for outcomes in (before, after)]
        interval = f"{points:+.1f} ({low:+.1f} … {high:+.1f})"
        rows.append([claim, paper, name, *scores, interval, verdict(claim == KEPT, low, high)])
    return markdown(rows)


def main(args: argparse.Namespace) -> None:
    clips = [load_clip(name, device=str(DEVICE)) for name in (args.before, args.clip)]
    if clips[0].config != clips[1].config or clips[0].image_size != world.SIZE:
        raise UserError(f"{args.clip}: must be a CLIP of a miniature, with the architecture of {args.before}")
    drawn = draw_scenes(4000, seed=61)
    with tempfile.TemporaryDirectory() as folder:
        world.write_mmvp(Path(folder), pairs=200, seed=60)
        pairs = read_mmvp(folder)
        outcomes = [measure(clip, drawn, pairs, fitted=2000) for clip in clips]
    print(f"1,800 unseen pairs and 2,000 unseen scenes (class accuracy: 4,000); {args.before} → {args.clip}\n")
    print(table(*outcomes))


if __name__ == "__main__":
    with exit_on_user_error("claims.py"):
        main(args)
