"""Training images, by step and position in the batch: Algorithm 1, line 1.

The source is a folder of images, shards in webdataset's format (uncompressed tar files, as img2dataset writes them), or
`synthetic` noise; see harness/sources.py. Images can be read in any order, so each epoch is a full shuffle, and a
run resumes at the next image.

All random draws for an image depend only on the run's seed, the step and the image's position in the global batch, not
on the number of processes, the micro-batch size, the reader threads or the device.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait

import numpy as np
import torch
from PIL import Image

from harness.errors import UserError, one_line
from harness.pictures import open_image, to_rgb
from harness.processes import copy_to_device
from harness.sources import ImageFiles, Shards, find_sources

ORDER, DRAWS, CROP = 0, 1, 2  # random streams: the shuffle, Algorithm 1's draws, the crops
SYNTHETIC = 1_000_000  # number of `synthetic` images
MAX_REPLACEMENTS = 30  # for one unreadable image, before the run stops
SMALLEST_CROP = 0.9  # share of the area; the shorter side then keeps at least this share


def image_rngs(seed: int, keys: list[tuple[int, int]]) -> list[np.random.Generator]:
    """A generator for the draws of each image, given its (step, position)."""
    return [np.random.default_rng((DRAWS, seed, step, position)) for step, position in keys]


class TrainingImages:
    """The images of a run: `dataset[step, position]`, with the position in the global batch.

    Each item is a dict: `images` (3, size, size) uint8; `keys`, the (step, position); `unreadable`, the names of the
    files that were skipped. Each epoch is shuffled anew. The next image in shuffled order replaces one that cannot be
    read, so even a whole shard may be missing.

    Raises:
        UserError: MAX_REPLACEMENTS replacements in a row could not be read either.
    """

    def __init__(self, files: ImageFiles | Shards | None, size: int, batch_size: int, seed: int = 0):
        self.files, self.size, self.batch_size, self.seed = files, size, batch_size, seed

    def __len__(self) -> int:
        return SYNTHETIC if self.files is None else len(self.files)

    def index(self, step: int, position: int) -> int:
        """The index of an image in `files`: batch after batch, through one shuffled epoch and then the next."""
        epoch, place = divmod(step * self.batch_size + position, len(self))
        return int(shuffled(len(self), self.seed, epoch)[place])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        step, position = key
        rng = np.random.default_rng((CROP, self.seed, step, position))
        if self.files is None:
            noise = rng.integers(0, 256, (3, self.size, self.size), dtype=np.uint8)
            return dict(images=noise, keys=key, unreadable=[])
        unreadable = []
        for offset in range(1 + MAX_REPLACEMENTS):
            i = self.index(step, position + offset)
            try:
                image = decode_crop(self.files.read(i), self.size, rng)
                return dict(images=image, keys=key, unreadable=unreadable)
            except Exception as error:  # Pillow raises almost any exception on a broken file
                unreadable.append(f"{self.files.name(i)} ({one_line(error)})")
        raise UserError(f"{len(unreadable)} images in a row could not be read: {'; '.join(unreadable[:3])}; …")


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in an epoch, (count,)."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def decode_crop(content: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random resized crop of an encoded image: (3, size, size) uint8, bicubic.

    Raises whatever Pillow raises on bytes that are not a complete image.
    """
    with open_image(content) as image:
        shrink = size / (SMALLEST_CROP * min(image.size))
        if shrink < 1:  # a JPEG decodes faster at 1/2, 1/4 or 1/8 of its size, if the crop stays large enough
            image.draft(None, (int(np.ceil(image.width * shrink)), int(np.ceil(image.height * shrink))))
        image = to_rgb(image)
    width, height = image.size
    left, top, right, bottom = random_crop_box(width, height, rng)
    box = (left * width, top * height, min(right, 1) * width, min(bottom, 1) * height)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A crop of 0.9–1.0 of the area with an aspect ratio of 3/4–4/3: (left, top, right, bottom) in [0, 1].

    Like torchvision's RandomResizedCrop: ten tries; if no box fits, the largest centered one with an allowed ratio.
    """
    for area, log_ratio in zip(rng.uniform(SMALLEST_CROP, 1.0, 10), rng.uniform(np.log(3 / 4), np.log(4 / 3), 10)):
        w = np.sqrt(area * width * height * np.exp(log_ratio)) / width
        h = np.sqrt(area * width * height / np.exp(log_ratio)) / height
        if w <= 1 and h <= 1:
            left, top = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
            return left, top, left + w, top + h
    w, h = min(1, height * 4 / 3 / width), min(1, width * 4 / 3 / height)
    return (1 - w) / 2, (1 - h) / 2, (1 + w) / 2, (1 + h) / 2


def open_images(source: Sequence[str], progress: bool = True) -> ImageFiles | Shards | None:
    """Opens the images of `source`: one folder, or shards given as paths, globs or brace lists; None for `synthetic`.

    `progress` shows a progress bar, and what was skipped, on stderr.

    Raises:
        UserError: a path does not exist, contains no image, or is not an uncompressed tar file.
    """
    if list(source) == ["synthetic"]:
        return None
    files = find_sources(source, progress)
    if progress:
        for note in files.notes:
            print(note, file=sys.stderr, flush=True)
    return files


def micro_batch_keys(
    first_step: int, steps: int, batch_size: int, micro_batch: int, rank: int, processes: int
) -> Iterator[list[tuple[int, int]]]:
    """The (step, position) keys of each micro-batch of process `rank`, from `first_step` to the last step."""
    for step in range(first_step, steps):
        for start in range(rank * micro_batch, batch_size, processes * micro_batch):
            yield [(step, position) for position in range(start, start + micro_batch)]


def read_batches(
    dataset: TrainingImages, keys: Iterator, workers: int, device: torch.device, waiting: Callable = lambda: None
) -> Iterator[dict]:
    """The micro-batches of `keys`, on `device`; `workers` of them are prefetched, by one thread each.

    Pillow releases the GIL, so threads are enough. Unlike processes, they always end with the run, and they need no
    shared memory. `waiting` is called every half second while a batch is late; it may raise, so a hung disk
    does not block signals.
    """

    def read(batch: list, into: Future) -> None:
        try:
            into.set_result(collate([dataset[key] for key in batch]))
        except BaseException as error:
            into.set_exception(error)

    def oldest() -> dict:
        while not wait(ahead[:1], timeout=0.5).done:
            waiting()
        return to_device(ahead.pop(0).result(), device)

    ahead = []
    for batch in keys:
        ahead.append(Future())
        threading.Thread(target=read, args=(batch, ahead[-1]), daemon=True).start()  # daemon: does not delay exit
        if len(ahead) > workers:
            yield oldest()
    while ahead:
        yield oldest()


def collate(items: list[dict]) -> dict:
    """A micro-batch: `images` (B, 3, S, S) uint8 in NumPy, their `keys`, and the names of all unreadable files.

    Reader threads use only NumPy: torch would start its own threads in each of them, and a thread that is inside torch
    when the process exits can abort it.
    """
    return dict(
        images=np.stack([item["images"] for item in items]),
        keys=[item["keys"] for item in items],
        unreadable=[name for item in items for name in item["unreadable"]],
    )


def to_device(batch: dict, device: torch.device) -> dict:
    """The micro-batch with its images on `device`, as pixels in [0, 1]."""
    return dict(batch, images=copy_to_device(batch["images"], device).float() / 255)
