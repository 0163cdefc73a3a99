"""Where images lie: a folder of them, or tar shards. Any image can be read at any time, and nothing is unpacked."""

import contextlib
import glob
import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.errors import UserError, one_line

IMAGE_SUFFIXES = {  # Pillow reads them by itself; "": dumps of the web have images without a suffix
    "", ".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2",
    ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm",
    ".psd", ".qoi", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
}  # fmt: skip


def is_image(name: str) -> bool:
    """By its suffix; hidden files (such as macOS's `._a.jpg`) do not count."""
    name = os.path.basename(name)
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def find_sources(source: Sequence[str], progress: bool = True) -> "ImageFiles | Shards":
    """One folder of images, or shards given as paths, globs or lists in braces.

    Raises:
        UserError: a path does not exist, contains no image, or is not a plain tar file.
    """
    paths = [path for name in source for path in named_paths(name)]
    missing = [path for path in paths if not os.path.isfile(path) and not os.path.isdir(path)]
    if missing:
        names = ", ".join(missing[:20]) + (f" and {len(missing) - 20:,} more" if len(missing) > 20 else "")
        raise UserError(f"{names}: no such file or folder (--data takes a folder, shards or a glob of shards)")
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]}: a folder among shards; --data takes one folder of images, or only shards")
    return ImageFiles(paths[0]) if folders else Shards(paths, progress)


def named_paths(name: str) -> Iterator[str]:
    """The paths that `name` means: one path, a glob, or a list in braces as shells and webdataset write it.

    `{000..331}.tar` → 000.tar … 331.tar; `{a,b}.tar` → a.tar, b.tar.
    """
    braces = re.search(r"\{(\d{1,6})\.\.(\d{1,6})\}|\{([^{}]*,[^{}]*)\}", name)
    if os.path.exists(name):
        yield name
    elif braces:
        first, last, words = braces.groups()
        parts = words.split(",") if words else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        for part in parts:
            yield from named_paths(name[: braces.start()] + part + name[braces.end() :])
    else:
        yield from sorted(glob.glob(name)) or [name]


def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


class ImageFiles:
    """The images below a folder, sorted by path. `len(files)`, `files.read(i)` → bytes, `files.name(i)` → str.

    Links to folders are followed, to each real folder once. `notes` are sentences on what was passed over.
    """

    def __init__(self, folder: str):
        self.folder, self.notes = folder, []
        paths, left_out, seen = [], Counter(), set()
        for place, folders, names in os.walk(folder, onerror=self.pass_over, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()  # so that os.walk does not go there
                continue
            seen.add(real)
            folders.sort()
            below = os.path.relpath(place, folder) + "/" if place != folder else ""
            for name in names:
                if is_image(name):
                    paths.append(os.fsencode(below + name))
                else:
                    left_out[os.path.splitext(name)[1].lower() or name] += 1
        if left_out:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in left_out.most_common(5))
            self.notes.append(f"{folder}: {left_out.total():,} files are left out, by their names no images ({kinds})")
        if not paths:
            why = "; ".join([f"{folder}: no images in this folder", *self.notes])
            raise UserError(f"{why}; shards are named by a glob: '{folder}/*.tar'")
        self.paths = np.array(sorted(paths))  # bytes: a quarter of the memory of str

    def pass_over(self, error: OSError) -> None:
        self.notes.append(f"{error.filename}: this folder is passed over ({error.strerror})")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def read(self, i: int) -> bytes:
        with open(os.open(self.name(i), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would wait for ever
            return file.read()

    def fingerprint(self) -> str:
        """Of the names below the folder, and of a thousand images' sizes: to ask for all would take minutes."""
        some = range(0, len(self), -(-len(self) // 1000))
        sizes = [os.path.getsize(self.name(i)) for i in some]
        return short_hash(self.paths.tobytes(), str(sizes).encode())


class Shards:
    """The images inside tar shards. `len(shards)`, `shards.read(i)` → bytes, `shards.name(i)` → str.

    3 million images take 48 MB: two int64 an image.
    """

    notes = ()  # that a shard's captions are left out is no news

    def __init__(self, paths: Sequence[str], progress: bool = True):
        self.shards, indexes, faults = list(paths), [], []
        for path in tqdm(self.shards, desc="index", unit="shard", disable=not progress, leave=False, delay=1):
            try:
                indexes.append(shard_index(path))
            except UserError as error:
                faults.append(str(error))
        if faults:  # all at once, so that all can be fetched again
            raise UserError("; ".join(faults))
        self.members = np.concatenate(indexes)  # (images, 2): offset and size in bytes
        self.ends = np.cumsum([len(index) for index in indexes])  # where each shard's images end in `members`
        if not len(self):
            raise UserError(f"{self.shards[0]}: no images (.jpg, .png, .webp, …) in these shards")

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

    def fingerprint(self) -> str:
        """Of the shards' names without their folders, and of every image's place and size."""
        names = "/".join(os.path.basename(path) for path in self.shards)
        return short_hash(os.fsencode(names), self.ends.tobytes(), self.members.tobytes())


def shard_index(path: str) -> np.ndarray:
    """Offset and size in bytes of every image in a plain tar, (images, 2) int64, in the tar's order.

    Kept in the user's cache folder. The first row there holds the shard's own size and modification time, so that a
    changed shard is indexed again.

    Raises:
        UserError: it cannot be read, or is not a plain, whole tar.
    """
    try:
        stat = os.stat(path)
        stamp = np.array([[stat.st_size, stat.st_mtime_ns]])
        rule = os.path.abspath(path) + " ".join(sorted(IMAGE_SUFFIXES))  # what the index depends on beside the bytes
        cache = Path(cache_folder(), short_hash(os.fsencode(rule)) + ".npy")
        with contextlib.suppress(Exception):  # absent, or NumPy's many ways to say that it is no array
            index = np.load(cache, allow_pickle=False)
            fresh = index.dtype == np.int64 and np.array_equal(index[:1], stamp)
            if fresh and index.min() >= 0 and index[1:].max(initial=0) <= stat.st_size:
                return index[1:]
        members = find_images(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None

    part = cache.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a read-only place or a full disk: the next start is slower, no more
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                np.save(file, np.concatenate([stamp, members]))
            os.replace(part, cache)  # whole or not at all, also when several processes write it
        finally:
            part.unlink(missing_ok=True)
    return members


def cache_folder() -> str:
    """Where indexes are kept; /dev/null/…, where nothing can be, for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(folder if os.path.isabs(folder) else os.devnull, "diva")


def find_images(path: str) -> np.ndarray:
    """The index of a shard, made from the tar itself. Tars joined with `cat` are read to the end of the last one.

    What stands where Python's tarfile stops reading is looked at: it takes any block that is no header for the end.
    """
    rows, start = [], 0
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path}: gzipped, so no image can be read alone; unpack it: gzip -dc {path} > NEW.tar")
        try:
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while member := tar.next():
                        if member.size < 0:
                            raise tarfile.ReadError("a negative size")
                        if member.isreg() and is_image(member.name):
                            rows.append((member.offset_data, member.size))
                        tar.members.clear()  # it keeps a kilobyte of each
                start = next_tar(file, tar.offset)
        except Exception as error:  # tarfile raises more than its own kind on a broken header
            raise UserError(f"{path}: not a whole tar file ({one_line(error)}); fetch it again") from None
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def next_tar(file, end: int) -> int | None:
    """Where another tar begins after the empty blocks that end one at byte `end`; None if nothing follows them."""
    file.seek(end)
    block = file.read(512)
    if not block:
        raise tarfile.ReadError("the empty blocks at its end are missing")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {end}")
    while part := file.read(1 << 20):
        if content := part.lstrip(b"\0"):
            first = file.tell() - len(content)
            return first - first % 512
    return None
