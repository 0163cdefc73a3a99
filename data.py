"""Images, any of them at any time: Algorithm 1, line 1.

A source is a folder of images, webdataset shards as img2dataset writes them (plain tar files), or `synthetic`.
Shards are read in place: an index of every image's offset and size makes a tar as random-access as a folder, so the
order is a full shuffle, a run continues at an exact position, and nothing is unpacked.

Every random number of training belongs to one image: its generator is seeded with the run's seed, the step and the
image's position in the global batch, and with nothing else. The number of processes, the micro-batch, the workers and
the device therefore change no draw.
"""

import contextlib
import glob
import io
import os
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from harness.errors import UserError, brief

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SYNTHETIC = 1_000_000  # images in the set `synthetic`
TRIES = 30  # at one readable image


def is_image(name: str) -> bool:
    """By its suffix; hidden files (such as macOS's `._a.jpg`) do not count."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith(".")


def stays_inside(name: str) -> bool:
    """A member of a shard that would not leave the folder if it were unpacked, which nothing here does."""
    return not name.startswith("/") and ".." not in name.split("/")


def image_paths(folder: str) -> Iterator[str]:
    """The images below a folder. Regular files only: to read from a pipe would wait for ever."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from image_paths(entry.path)
        elif is_image(entry.name) and entry.is_file():
            yield entry.path


class ImageFiles:
    """The images below a folder, sorted by path. `len(files)`, `files.read(i)` → bytes, `files.name(i)` → str."""

    def __init__(self, folder: str):
        self.folder = folder
        paths = sorted(os.path.relpath(path, folder) for path in image_paths(folder))
        if not paths:
            raise UserError(f"{folder}: no images in this folder; shards are named by a glob: '{folder}/*.tar'")
        self.paths = np.array([os.fsencode(path) for path in paths])  # bytes: a quarter of the memory of str

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def read(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()


class Shards:
    """The images inside tar shards. `len(shards)`, `shards.read(i)` → bytes, `shards.name(i)` → str.

    3 million images take 48 MB: two int64 an image, kept in numpy so that forked workers share them.
    """

    def __init__(self, paths: Sequence[str], progress: bool = True):
        self.shards = list(paths)
        bar = tqdm(self.shards, desc="index", unit="shard", disable=not progress, leave=False, delay=1)
        members = [shard_index(path) for path in bar]
        self.members = np.concatenate(members)  # (images, 2): offset and size in bytes
        self.ends = np.cumsum([len(m) for m in members])  # where each shard's images end in `members`
        if not len(self):
            raise UserError(f"{self.shards[0]}: no images ({', '.join(IMAGE_SUFFIXES)}) in these shards")

    def __len__(self) -> int:
        return len(self.members)

    def shard(self, i: int) -> str:
        return self.shards[np.searchsorted(self.ends, i, side="right")]

    def name(self, i: int) -> str:
        return f"{self.shard(i)} at byte {self.members[i, 0]}"

    def read(self, i: int) -> bytes:
        offset, size = self.members[i].tolist()
        with open(self.shard(i), "rb") as shard:
            shard.seek(offset)
            return shard.read(size)


def shard_index(path: str) -> np.ndarray:
    """Offset and size in bytes of every image in a plain tar, (images, 2) int64, in the tar's order.

    Cached in the user's cache folder; the first row there holds the shard's own size and modification time, so that a
    changed shard is indexed again.

    Raises:
        UserError: it is not a plain, whole tar.
    """
    stat = os.stat(path)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diva"
    cache = folder / (os.path.abspath(path).strip("/").replace("/", "%") + ".npy")
    stamp = np.array([[stat.st_size, stat.st_mtime_ns]])
    try:
        index = np.load(cache, allow_pickle=False)
        fresh = index.dtype == np.int64 and np.array_equal(index[:1], stamp)
        if fresh and index.min() >= 0 and index[1:].max(initial=0) <= stat.st_size:
            return index[1:]
    except Exception:  # absent, or NumPy's many ways to say that it is no array: made again below
        pass

    with open(path, "rb") as shard:
        if shard.read(2) == b"\x1f\x8b":
            raise UserError(f"{path}: gzipped, so no image can be read alone; unpack it: gzip -dc {path} > NEW.tar")
    try:
        with tarfile.open(path, "r:") as tar:
            rows = []
            while member := tar.next():
                if member.size < 0:
                    raise tarfile.ReadError("a negative size")
                if member.isreg() and is_image(member.name) and stays_inside(member.name):
                    rows.append((member.offset_data, member.size))
                tar.members.clear()  # it keeps a kilobyte of each
    except Exception as error:  # tarfile raises more than its own kind on a broken header
        raise UserError(f"{path}: not a whole tar file ({error})") from None
    members = np.array(rows, dtype=np.int64).reshape(-1, 2)
    part = cache.with_name(f"{cache.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a read-only place or a full disk: the next start is slower, no more
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                np.save(file, np.concatenate([stamp, members]))
            os.replace(part, cache)  # whole or not at all, also when several processes write it
        finally:
            part.unlink(missing_ok=True)
    return members


def open_images(source: Sequence[str], progress: bool = True) -> ImageFiles | Shards | None:
    """The images of `source`: one folder, or any number of shards, as paths or globs; None for `synthetic`.

    Raises:
        UserError: a path does not exist, holds no image, or is not a plain tar.
    """
    if list(source) == ["synthetic"]:
        return None
    paths = [path for pattern in source for path in (sorted(glob.glob(pattern)) or [pattern])]
    for path in paths:
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise UserError(f"{path}: no such file or folder (--data takes a folder, shards or a glob of shards)")
        if os.path.isdir(path) and len(paths) > 1:
            raise UserError(f"{path}: a folder among shards; --data takes one folder of images, or only shards")
    return ImageFiles(paths[0]) if os.path.isdir(paths[0]) else Shards(paths, progress)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture a person sees, in RGB: turned as its EXIF data says, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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


def decode_crop(data: bytes, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A random resized crop of an encoded image: (3, size, size) uint8, bicubic, in one resize.

    Raises whatever Pillow raises on bytes that are no image, or only a part of one.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # the EXIF orientation swaps the sides
            width, height = height, width
        left, top, right, bottom = random_crop_box(width, height, rng)
        shrink = size / min((right - left) * width, (bottom - top) * height)
        if shrink < 1:  # JPEG can decode at a half, a quarter or an eighth: the smallest that still holds the crop
            image.draft(None, (int(np.ceil(image.width * shrink)), int(np.ceil(image.height * shrink))))
        image = to_rgb(image)
    width, height = image.size
    box = (left * width, top * height, min(right, 1) * width, min(bottom, 1) * height)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


class TrainingImages(Dataset):
    """Images by their place in training: `images[step, position]`, the position being that in the global batch.

    Returns a dict: `images` (3, size, size) uint8; `unreadable`, the names of the files that had to be passed over;
    and all that `draw(rng)` returns for this image, a dict of arrays. Each pass over the set has its own full
    shuffle. An unreadable image is replaced by the next one, and if need be by ever further ones, so that a whole
    shard may be missing.
    """

    def __init__(
        self,
        files: ImageFiles | Shards | None,
        size: int,
        batch_size: int,
        seed: int = 0,
        draw: Callable[[np.random.Generator], dict[str, np.ndarray]] = lambda rng: {},
    ):
        self.files, self.size, self.batch_size, self.seed, self.draw = files, size, batch_size, seed, draw
        self.epoch, self.order = -1, np.empty(0)

    def __len__(self) -> int:
        return SYNTHETIC if self.files is None else len(self.files)

    def index(self, step: int, position: int) -> int:
        """Which image stands there: the global batches follow one another through shuffled epochs."""
        epoch, place = divmod(step * self.batch_size + position, len(self))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((0, self.seed, epoch)).permutation(len(self))
        return int(self.order[place])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        step, position = key
        rng = np.random.default_rng((1, self.seed, step, position))
        drawn = self.draw(rng)
        if self.files is None:
            return dict(images=torch.from_numpy(synthetic_image(self.size, rng)), unreadable=[], **drawn)
        first, unreadable = self.index(step, position), []
        while len(unreadable) < TRIES:
            i = (first + 2 ** len(unreadable) - 1) % len(self)
            try:
                image = decode_crop(self.files.read(i), self.size, rng)
                return dict(images=image, unreadable=unreadable, **drawn)
            except Exception as error:  # Pillow raises almost any exception on a broken file
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else brief(error)
                unreadable.append(f"{self.files.name(i)} ({reason})")
        return dict(images=torch.zeros(3, self.size, self.size, dtype=torch.uint8), unreadable=unreadable, **drawn)


def synthetic_image(size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise in the shape of an image, (3, size, size) uint8, for benchmarks and dry runs."""
    return rng.integers(0, 256, (3, size, size), dtype=np.uint8)


def collate(items: list[dict]) -> dict:
    """A batch: tensors stacked, the lists of unreadable files joined."""
    unreadable = [name for item in items for name in item.pop("unreadable")]
    return dict(default_collate(items), unreadable=unreadable)


def batch_keys(first: int, steps: int, batch_size: int, micro_batch: int, rank: int, processes: int) -> Iterator:
    """The (step, position) keys of each micro-batch of process `rank`, from step `first` to the last."""
    for step in range(first, steps):
        for start in range(rank * micro_batch, batch_size, processes * micro_batch):
            yield [(step, position) for position in range(start, start + micro_batch)]


def read_batches(dataset: TrainingImages, keys: Iterator, workers: int, device: torch.device) -> Iterator[dict]:
    """The batches of `keys` on `device`, pixels in [0, 1]; `workers` processes read ahead (0: this one reads).

    Raises:
        UserError: one of these processes was killed; the run goes on from its last save.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_run,
    )
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise a reader's death in the middle of a step
    try:
        for batch in batches:
            yield to_device(batch, device)
    except (RuntimeError, EOFError, OSError) as error:  # the latter two: it died with a batch under way
        if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Pin memory thread")):
            raise
        raise UserError(f"a process that reads images has died ({brief(error)}); the same command goes on") from None


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C, clusters and torchrun signal every process; the run needs its readers to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch's tensors on `device`, its images as pixels in [0, 1]."""
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    return dict(batch, images=batch["images"].float() / 255)
