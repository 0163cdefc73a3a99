"""Zero-shot accuracy of any CLIPs on a folder of pictures: did a training cost what CLIP could do before?

    python extras/zero_shot.py openai-vit-l-14-224 runs/l14/clip --data imagenet/val

FOLDER has a subfolder for each class, named after it (`fire_truck` is read as "fire truck"; all of ImageNet may keep
its own names, `n01440764` …, and is read by OpenAI's). A picture is right if the nearest class is its own; a class is
the mean of its name's embeddings in all templates. All in fp32.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.recipes import locate_clip
from harness.scores import mcnemar
from harness.sources import ImageFiles
from model import Clip, load_clip


def read_folder(folder: str) -> tuple[list[str], list[str], np.ndarray]:
    """The classes' names, the pictures' paths (n,), and which class each of them is (n,).

    UserError: fewer than two classes, a class without pictures, or names that are ImageNet's numbers in part.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: no such folder")
    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"--data {folder}: needs a subfolder for each class, and has {len(classes)}")
    names = [path.name.replace("_", " ") for path in classes]
    if numbers := [name for name in names if re.fullmatch("n[0-9]{8}", name)]:
        if len(numbers) != len(open_clip.IMAGENET_CLASSNAMES) or len(numbers) != len(names):
            raise UserError(f"--data {folder}: {numbers[0]} is no name; without all of ImageNet, name folders in words")
        names = list(open_clip.IMAGENET_CLASSNAMES)  # in the order of their numbers
    paths, labels = [], []
    for label, path in enumerate(classes):
        files = ImageFiles(str(path))
        paths += [files.name(i) for i in range(len(files))]
        labels += [label] * len(files)
    return names, paths, np.array(labels)


def read_pictures(clip: Clip, paths: Sequence[str], batch_size: int = 64) -> Iterator[torch.Tensor]:
    """The pictures as CLIP's input, in batches (B, 3, s, s). UserError: one cannot be read."""
    bar = tqdm(total=len(paths), desc="pictures", unit="picture", leave=False, delay=1)
    with bar, ThreadPoolExecutor() as pool:  # a GPU encodes faster than one core reads
        for start in range(0, len(paths), batch_size):
            batch = list(pool.map(clip.preprocess_file, paths[start : start + batch_size]))
            yield torch.stack(batch)
            bar.update(len(batch))


@torch.inference_mode()
def classify(
    clip: Clip, batches: Iterable[torch.Tensor], names: Sequence[str], device, templates: Sequence | None = None
) -> np.ndarray:
    """Which class's name is nearest to each picture, (n,) int.

    `batches` are pictures as this CLIP's input, (B, 3, s, s), `templates` sentences with {} in the name's place
    (OpenAI's 80). UserError: this CLIP has no tokenizer, or gives what is not finite.
    """
    model, sentences = clip.model.to(device), open_clip.OPENAI_IMAGENET_TEMPLATES
    if templates:
        sentences = [partial(text.replace, "{}") for text in templates]
    classes = open_clip.build_zero_shot_classifier(model, clip.tokenizer(), names, sentences, device=device)  # (D, C)
    nearest = []
    for batch in batches:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # CUDA's convolutions are in TF32 by default
            cosines = model.encode_image(batch.to(device), normalize=True) @ classes  # (B, C)
        if not cosines.isfinite().all():
            raise UserError(f"{clip.source}: its embeddings are not finite; its weights are broken")
        nearest.append(cosines.argmax(1).cpu())
    return torch.cat(nearest).numpy()


def wilson(right: np.ndarray, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of the share of `right`, in percent; within 0 … 100, also where all are right."""
    n, share = len(right), right.mean()
    middle, half = share + z * z / 2 / n, z * np.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    return tuple(100 * float(end) / (1 + z * z / n) for end in (middle - half, middle + half))


def change(before: np.ndarray, after: np.ndarray) -> str:
    """The paired change between two CLIPs' outcomes (n,) bool, in words."""
    won, lost, n = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    # to draw n pictures with replacement is to draw how many of them were won, lost and neither
    drawn = np.random.default_rng(0).multinomial(n, [won / n, lost / n, 1 - (won + lost) / n], 10_000)
    low, high = np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    words = f"{100 * (won - lost) / n:+.2f} points (95% interval {low:+.2f} … {high:+.2f})"
    return f"{words}, pictures won {won}, lost {lost}, exact McNemar p = {mcnemar(won, lost):.2g}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Zero-shot accuracy of any CLIPs on a folder of pictures.")
    parser.error = usage_error
    clips = "recipes, ARCH:TAG of open_clip, hf-hub:OWNER/NAME or folders; CLIP@WEIGHTS too; changes are from the first"
    parser.add_argument("clips", nargs="+", metavar="CLIP", help=clips)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a subfolder for each class, named after it")
    sentences = "sentences with {} for the name, such as 'a photo of a {}.' (default: OpenAI's 80)"
    parser.add_argument("--templates", nargs="+", metavar="TEXT", help=sentences)
    args = parser.parse_args(argv)
    for name in args.clips:
        locate_clip(name)
    for text in args.templates or []:
        if "{}" not in text:
            raise UserError(f"--templates {text!r}: needs {{}} where the name goes")
    names, paths, labels = read_folder(args.data)
    device, rights = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    print(f"{len(paths):,} pictures of {len(names):,} classes, top-1 with its 95% interval", flush=True)
    for name in args.clips:
        clip = load_clip(name, device=str(device))
        rights.append(classify(clip, read_pictures(clip, paths), names, device, args.templates) == labels)
        print("{}: {:.2f}% ({:.2f}–{:.2f})".format(name, 100 * rights[-1].mean(), *wilson(rights[-1])), flush=True)
        if len(rights) > 1:
            print(f"    change from {args.clips[0]}: {change(rights[0], rights[-1])}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error("zero_shot.py"):
        main()
