"""Top-1 zero-shot accuracy of CLIPs on a folder of images: did training cost zero-shot ability?

    python extras/zero_shot.py openai-vit-l-14-224 runs/l14/clip --data imagenet/val

FOLDER has a subfolder per class, named after the class (`fire_truck` is read as "fire truck"). The folders of ImageNet
(`n01440764` …) and ImageNet-V2 (`0` … `999`) get open_clip's class names. A class is the mean embedding of its name in
all templates; an image is right if its own class is the nearest. Everything is computed in fp32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error, warn
from harness.recipes import locate_clip


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Zero-shot accuracy of any number of CLIPs on a folder of images.")
    parser.error = usage_error
    clips = "recipes, ARCH:TAG, hf-hub:OWNER/NAME, folders, or CLIP@WEIGHTS; each is compared with the first"
    parser.add_argument("clips", nargs="+", metavar="CLIP", help=clips)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder with a subfolder per class")
    sentences = "sentences with {} for the name, such as 'a photo of a {}.' (default: OpenAI's 80)"
    parser.add_argument("--templates", nargs="+", metavar="TEXT", help=sentences)
    args = parser.parse_args(argv)
    for name in args.clips:
        locate_clip(name)
    for text in args.templates or []:
        if "{}" not in text:
            raise UserError(f"--templates {text!r}: must contain {{}} where the name goes")
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("zero_shot.py"):
        args = read_args()

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import open_clip
import torch

from evaluate_mmvp import read_pictures
from harness.precision import full_fp32
from harness.scores import bootstrap_means, mcnemar, percentile_interval
from harness.sources import ImageFiles
from model import Clip, load_clip


def read_folder(folder: str) -> tuple[list[str], list[str], np.ndarray]:
    """The names of the classes, the paths of the images (n,), and the class of each image, (n,) int.

    Raises:
        UserError: fewer than two classes, a class without images, two classes of the same name, or numbers that are
            not all of ImageNet's.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: no such folder")
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"--data {folder}: has {len(classes)} subfolders, but needs one per class")
    names = open_clip.IMAGENET_CLASSNAMES  # in the order of ImageNet's numbers
    if set(classes) == {str(i) for i in range(len(names))}:  # ImageNet-V2
        classes.sort(key=int)
    elif len(classes) != len(names) or not all(re.fullmatch("n[0-9]{8}", name) for name in classes):
        names = [" ".join(name.replace("_", " ").split()) for name in classes]
        number = next((name for name in names if re.fullmatch("n?[0-9]+", name)), None)
        if number:
            raise UserError(
                f"--data {folder}: {number} is a number, not a name; rename the subfolders (numbers are accepted only "
                f"if all 1,000 classes of ImageNet are there: n01440764 …, or 0 … 999)"
            )
        name, count = Counter(name.lower() for name in names).most_common(1)[0]
        if count > 1:
            raise UserError(f"--data {folder}: {count} subfolders name the class {name!r}; merge or rename them")
    files, label_of = ImageFiles(folder), {name: label for label, name in enumerate(classes)}
    for note in files.notes:
        warn(note)
    images = [(path, Path(path).relative_to(folder).parts[0]) for path in map(files.name, range(len(files)))]
    images = [(path, label_of[name]) for path, name in images if name in label_of]  # skip images outside the subfolders
    paths, labels = [path for path, _ in images], np.array([label for _, label in images])
    if empty := set(range(len(classes))) - set(labels.tolist()):
        raise UserError(f"{Path(folder, classes[min(empty)])}: no images in this folder")
    return list(names), paths, labels


@torch.inference_mode()
def classify(
    clip: Clip, batches: Iterable[torch.Tensor], names: Sequence[str], device, templates: Sequence | None = None
) -> np.ndarray:
    """The class whose name is nearest to each image, (n,) int.

    Args:
        batches: images as this CLIP's input, (B, 3, s, s).
        templates: sentences with {} where the name goes; OpenAI's 80 by default.

    Raises:
        UserError: this CLIP has no tokenizer, or its embeddings are not finite.
    """
    model, sentences, nearest = clip.model.to(device), open_clip.OPENAI_IMAGENET_TEMPLATES, []
    if templates:
        sentences = [partial(text.replace, "{}") for text in templates]
    with full_fp32():
        classes = open_clip.build_zero_shot_classifier(model, clip.tokenizer(), names, sentences, device=device)
        for batch in batches:
            cosines = model.encode_image(batch.to(device), normalize=True) @ classes  # (B, D) @ (D, C)
            if not cosines.isfinite().all():
                raise UserError(f"{clip.source}: its embeddings are not finite; its weights are broken")
            nearest.append(cosines.argmax(1).cpu())
    return torch.cat(nearest).numpy()


def wilson(right: np.ndarray, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of the share of `right`, in percent; within 0 and 100 even if all are right."""
    n, share = len(right), right.mean()
    middle, half = share + z * z / 2 / n, z * np.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    return tuple(100 * float(end) / (1 + z * z / n) for end in (middle - half, middle + half))


def change(before: np.ndarray, after: np.ndarray) -> str:
    """The paired change between two CLIPs' outcomes (n,) bool, as text."""
    difference = 100 * (after.astype(int) - before)  # in points
    low, high = percentile_interval(bootstrap_means(difference, np.random.default_rng(0)))
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    words = f"{difference.mean():+.2f} points (95% interval {low:+.2f} … {high:+.2f})"
    return f"{words}, images won {won}, lost {lost}, exact McNemar p = {mcnemar(won, lost):.2g}"


def main(args: argparse.Namespace) -> None:
    names, paths, labels = read_folder(args.data)
    device, rights = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    print(f"{len(paths):,} images of {len(names):,} classes; top-1 accuracy with its 95% interval", flush=True)
    for name in args.clips:
        clip = load_clip(name, device=str(device))
        rights.append(classify(clip, read_pictures(clip, paths, 64), names, device, args.templates) == labels)
        print("{}: {:.2f}% ({:.2f}–{:.2f})".format(name, 100 * rights[-1].mean(), *wilson(rights[-1])), flush=True)
        if len(rights) > 1:
            print(f"    change from {args.clips[0]}: {change(rights[0], rights[-1])}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error("zero_shot.py"):
        main(args)
