"""Images, any of them at any time: Algorithm 1, line 1.

A source is a folder of images, webdataset shards as img2dataset writes them (plain tar files), or `synthetic`; see
harness/sources.py. Any image of it can be read alone, so each epoch is a full shuffle, and a stopped run goes on at the
exact image.

What is random about an image, its crop, is drawn by a generator of its own, seeded with the run's seed, the step and
the image's position in the global batch, and with nothing else. The number of processes, the micro-batch, the threads
that read and the device therefore change no image.
"""

import collections
import functools
import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from harness.errors import UserError, brief
from harness.sources import ImageFiles, Shards, named_paths

ORDER, STATES, CROP = 0, 1, 2  # so that the generators of the shuffle, of what train.py draws and of the crops differ
SYNTHETIC = 1_000_000  # images in the set `synthetic`
MAX_REPLACEMENTS = 30  # tried for one image before the run stops
ORIENTATION = 0x0112  # EXIF's tag: how the camera was held, 1 to 8; from 5 on, width and height change places
TURNS = {  # what brings a picture of each orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TrainingImages:
    """Images by their place in training: `images[step, position]`, the position being that in the global batch.

    Returns a dict: `images` (3, size, size) uint8; `keys`, the (step, position); `unreadable`, the names of the files
    that had to be passed over. Each pass over the set has its own full shuffle. An image that cannot be read is
    replaced by the next one of the shuffled order, so that a whole shard may be missing.

    Raises:
        UserError: none of MAX_REPLACEMENTS images after it could be read either.
    """

    def __init__(self, files: ImageFiles | Shards | None, size: int, batch_size: int, seed: int = 0):
        self.files, self.size, self.batch_size, self.seed = files, size, batch_size, seed

    def __len__(self) -> int:
        return SYNTHETIC if self.files is None else len(self.files)

    def index(self, step: int, position: int) -> int:
        """Which image stands there: the global batches follow one another through shuffled epochs."""
        epoch, place = divmod(step * self.batch_size + position, len(self))
        return int(shuffled(len(self), self.seed, epoch)[place])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        step, position = key
        rng = np.random.default_rng((CROP, self.seed, step, position))
        if self.files is None:
            noise = rng.integers(0, 256, (3, self.size, self.size), dtype=np.uint8)
            return dict(images=torch.from_numpy(noise), keys=key, unreadable=[])
        unreadable = []
        for offset in range(1 + MAX_REPLACEMENTS):
            i = self.index(step, position + offset)
            try:
                image = decode_crop(self.files.read(i), self.size, rng)
                return dict(images=image, keys=key, unreadable=unreadable)
            except Exception as error:  # Pillow raises almost any exception on a broken file
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else brief(error)
                unreadable.append(f"{self.files.name(i)} ({reason})")
        raise UserError(f"{len(unreadable)} images in a row could not be read: {'; '.join(unreadable[:3])}; and so on")


@functools.lru_cache(maxsize=2)  # where an epoch ends, two are read at once
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in an epoch, (count,)."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def decode_crop(data: bytes, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A random resized crop of an encoded image: (3, size, size) uint8, bicubic, in one resize.

    Raises whatever Pillow raises on bytes that are no image, or only a part of one.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format not in ("JPEG", "MPO"):  # elsewhere EXIF data may stand behind the pixels
            image.load()
        width, height = image.size
        if orientation(image) >= 5:
            width, height = height, width
        left, top, right, bottom = random_crop_box(width, height, rng)
        shrink = size / min((right - left) * width, (bottom - top) * height)
        if shrink < 1:  # JPEG can decode at a half, a quarter or an eighth: the smallest that still holds the crop
            image.draft(None, (int(np.ceil(image.width * shrink)), int(np.ceil(image.height * shrink))))
        image = to_rgb(image)
    width, height = image.size
    box = (left * width, top * height, min(right, 1) * width, min(bottom, 1) * height)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1)))


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A crop of 0.9–1.0 of the area and an aspect ratio of 3/4–4/3, as (left, top, right, bottom) shares of the sides.

    The usual random resized crop: ten tries for a box that fits, else the largest centred one of an allowed ratio.
    """
    for area, log_ratio in zip(rng.uniform(0.9, 1.0, 10), rng.uniform(np.log(3 / 4), np.log(4 / 3), 10)):
        w = np.sqrt(area * width * height * np.exp(log_ratio)) / width
        h = np.sqrt(area * width * height / np.exp(log_ratio)) / height
        if w <= 1 and h <= 1:
            left, top = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
            return left, top, left + w, top + h
    w, h = min(1, height * 4 / 3 / width), min(1, width * 4 / 3 / height)
    return (1 - w) / 2, (1 - h) / 2, (1 + w) / 2, (1 + h) / 2


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture a person sees, in RGB: turned as its EXIF data says, transparency on white, 16 bits scaled to 8."""
    if orientation(image) > 1:
        image = image.transpose(TURNS[orientation(image)])
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1, upright, where EXIF does not say it, or is broken."""
    try:
        value = image.getexif().get(ORIENTATION)
        return value if value in TURNS else 1
    except Exception:  # broken metadata is no reason to lose whole pixels
        return 1


def open_images(source: Sequence[str], progress: bool = True) -> ImageFiles | Shards | None:
    """The images of `source`: one folder, or any number of shards, as paths, globs or lists; None for `synthetic`.

    With `progress` a bar and what was passed over are shown on stderr.

    Raises:
        UserError: a path does not exist, holds no image, or is not a plain tar.
    """
    if list(source) == ["synthetic"]:
        return None
    paths = [path for name in source for path in named_paths(name)]
    missing = [path for path in paths if not os.path.isfile(path) and not os.path.isdir(path)]
    if missing:
        names = ", ".join(missing[:20]) + (f" and {len(missing) - 20:,} more" if len(missing) > 20 else "")
        raise UserError(f"{names}: no such file or folder (--data takes a folder, shards or a glob of shards)")
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]}: a folder among shards; --data takes one folder of images, or only shards")
    files = ImageFiles(paths[0]) if folders else Shards(paths, progress)
    if progress:
        for note in files.notes:
            print(note, file=sys.stderr, flush=True)
    return files


def fingerprint(files: ImageFiles | Shards | None) -> str:
    """Tells sets of images apart, wherever they lie."""
    return "synthetic" if files is None else files.fingerprint()


def batch_keys(first: int, steps: int, batch_size: int, micro_batch: int, rank: int, processes: int) -> Iterator:
    """The (step, position) keys of each micro-batch of process `rank`, from step `first` to the last."""
    for step in range(first, steps):
        for start in range(rank * micro_batch, batch_size, processes * micro_batch):
            yield [(step, position) for position in range(start, start + micro_batch)]


def read_batches(dataset: TrainingImages, keys: Iterator, workers: int, device: torch.device) -> Iterator[dict]:
    """The batches of `keys`, ready for `device` (see `to_device`); `workers` of them are read ahead, each by a thread.

    Pillow works outside of Python's lock, so threads are enough; unlike processes, they end with the run, however it
    ends, and need no memory to hand images over in.
    """

    def read(batch: list, into: Future) -> None:
        try:
            into.set_result(collate([dataset[key] for key in batch]))
        except BaseException as error:
            into.set_exception(error)

    ahead = collections.deque()
    for batch in keys:
        ahead.append(Future())
        threading.Thread(target=read, args=(batch, ahead[-1]), daemon=True).start()  # daemon: no exit waits for it
        if len(ahead) > workers:
            yield to_device(ahead.popleft().result(), device)
    for future in ahead:
        yield to_device(future.result(), device)


def collate(items: list[dict]) -> dict:
    """A batch: `images` (B, 3, S, S) uint8, `keys` in its order, the lists of unreadable files joined.

    By NumPy: torch would start threads of its own in each thread that reads.
    """
    return dict(
        images=torch.from_numpy(np.stack([item["images"] for item in items])),
        keys=[item["keys"] for item in items],
        unreadable=[name for item in items for name in item["unreadable"]],
    )


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch whose images are on `device`, as pixels in [0, 1]."""
    images = batch["images"]
    if device.type == "cuda":
        images = images.pin_memory()  # then the copy does not wait for what the GPU is doing
    return dict(batch, images=images.to(device, non_blocking=True).float() / 255)
