"""Random access to the images in a folder or in tar shards. Shards are not unpacked."""

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
from harness.files import atomic_path
from harness.pictures import IMAGE_SUFFIXES


def find_sources(source: Sequence[str], progress: bool = True) -> "ImageFiles | Shards":
    """Opens one folder of images, or shards given as paths, globs or brace lists.

    If any name contains ".tar", all other files are skipped: img2dataset writes a .json and a .parquet next to each
    shard.

    Raises:
        UserError: a path does not exist, contains no image, or is not an uncompressed tar file.
    """
    paths = [path for name in source for path in expand_paths(name)]
    missing = [path for path in paths if not os.path.isfile(path) and not os.path.isdir(path)]
    if missing:
        names = ", ".join(missing[:20]) + (f" and {len(missing) - 20:,} more" if len(missing) > 20 else "")
        raise UserError(f"{names}: no such file or folder (--data takes a folder, shards or a glob of shards)")
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]}: a folder among shards; --data takes one folder of images, or only shards")
    if folders:
        return ImageFiles(paths[0])
    shards = Shards([path for path in paths if ".tar" in os.path.basename(path)] or paths, progress)
    if skipped := Counter(suffix(path) for path in set(paths) - set(shards.shards)):
        shards.notes.append(f"skipped {in_words(skipped, 'files that are not named .tar')}")
    return shards


def expand_paths(name: str) -> Iterator[str]:
    """Expands a glob, or a brace list as in shells and webdataset: `{000..331}.tar`, `{a,b}.tar`.

    Brackets and braces in the name of an existing file or folder are taken literally.
    """
    folder, pattern = name, ""
    while folder and not os.path.exists(folder):
        folder, last = os.path.split(folder)
        pattern = os.path.join(last, pattern) if pattern else last
    braces = re.search(r"\{(\d{1,6})\.\.(\d{1,6})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not pattern:
        yield name
    elif braces:
        first, last, words = braces.groups()
        parts = words.split(",") if words else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        for part in parts:
            yield from expand_paths(os.path.join(folder, pattern[: braces.start()] + part + pattern[braces.end() :]))
    else:
        found = sorted(glob.glob(pattern, root_dir=folder or None))
        yield from [os.path.join(folder, path) for path in found] or [name]


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def in_words(skipped: Counter, what: str) -> str:
    """For example "3 files (.txt: 2, .json: 1)"."""
    kinds = ", ".join(f"{kind}: {number:,}" for kind, number in skipped.most_common(10))
    return f"{skipped.total():,} {what} ({kinds})"


def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


class ImageFiles:
    """The images below a folder, sorted by path: `len(files)`, `files.read(i)` → bytes, `files.name(i)` → str.

    Links to folders are followed, but no folder is searched twice. `notes` say what is skipped: unreadable folders,
    files without an image's suffix, dangling links, and everything hidden (.ipynb_checkpoints and .git hold copies of
    images).
    """

    def __init__(self, folder: str):
        self.folder, self.notes = folder, []
        paths, skipped, searched = [], Counter(), set()
        folders = [""]  # relative to `folder`; grows in the loop
        for below in folders:
            place = os.path.join(folder, below)
            if os.path.realpath(place) in searched:
                continue
            searched.add(os.path.realpath(place))
            subfolders = []
            try:
                for entry in os.scandir(place):
                    path = os.path.join(below, entry.name)
                    if entry.name.startswith("."):
                        skipped["hidden"] += 1
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        skipped["dangling links"] += 1
                    elif entry.is_dir():
                        subfolders.append(path)
                    elif not entry.is_file():  # reading a pipe could block
                        skipped["pipes or devices"] += 1
                    elif suffix(path) not in IMAGE_SUFFIXES:
                        skipped[suffix(path)] += 1
                    else:
                        paths.append(os.fsencode(path))
            except OSError as error:
                self.notes.append(f"{place}: folder skipped ({error.strerror})")
            folders += sorted(subfolders)
        if skipped:
            self.notes.append(f"{folder}: skipped {in_words(skipped, 'entries')}")
        if not paths:
            why = "; ".join([f"{folder}: no images in this folder", *self.notes])
            raise UserError(f"{why}; to use shards, give a glob: '{folder}/*.tar'")
        self.paths = np.array(sorted(paths))  # bytes take a quarter of the memory of str

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def read(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def fingerprint(self) -> str:
        """A hash of the relative paths, and of the sizes of up to a thousand images: reading all takes minutes."""
        some = range(0, len(self), -(-len(self) // 1000))
        sizes = [os.path.getsize(self.name(i)) for i in some]
        return short_hash(self.paths.tobytes(), str(sizes).encode())


class Shards:
    """The images in tar shards: `len(shards)`, `shards.read(i)` → bytes, `shards.name(i)` → str.

    Captions and other members are ignored. The index of 3 million images takes 48 MB: two int64 each.
    """

    def __init__(self, paths: Sequence[str], progress: bool = True):
        self.shards, self.notes, indexes, faults = list(paths), [], [], []
        for path in tqdm(self.shards, desc="index", unit="shard", disable=not progress, leave=False, delay=1):
            try:
                indexes.append(shard_index(path))
            except UserError as error:
                faults.append(str(error))
        if faults:  # report all bad shards at once
            raise UserError("; ".join(faults))
        self.members = np.concatenate(indexes)  # (images, 2): offset and size in bytes
        self.ends = np.cumsum([len(index) for index in indexes])  # the end of each shard's images in `members`
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
        """A hash of the shards' file names, and of the offset and size of every image."""
        names = "/".join(os.path.basename(path) for path in self.shards)
        return short_hash(os.fsencode(names), self.ends.tobytes(), self.members.tobytes())


def shard_index(path: str) -> np.ndarray:
    """Offset and size in bytes of every image in an uncompressed tar, (images, 2) int64, in the tar's order.

    The index is cached in the user's cache folder. Its first row is the shard's size and modification time, so that a
    changed shard is indexed again.

    Raises:
        UserError: the shard cannot be read, or is not a complete, uncompressed tar.
    """
    try:
        stat = os.stat(path)
        stamp = np.array([[stat.st_size, stat.st_mtime_ns]])
        rule = os.path.abspath(path) + "2" + " ".join(sorted(IMAGE_SUFFIXES))  # "2": the version of `find_images`
        place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        place = place if os.path.isabs(place) else os.devnull  # without a home folder nothing is cached
        cache = Path(place, "diva", short_hash(os.fsencode(rule)) + ".npy")
        with contextlib.suppress(Exception):  # the index is missing, broken or of another shard
            index = np.load(cache, allow_pickle=False)
            fresh = index.dtype == np.int64 and np.array_equal(index[:1], stamp)
            if fresh and index.min() >= 0 and index[1:].max(initial=0) <= stat.st_size:
                with open(path, "rb") as shard:  # another shard may have the same size and time: check the last header
                    shard.seek(index[-1, 0] - 512)
                    header = tarfile.TarInfo.frombuf(shard.read(512), tarfile.ENCODING, "surrogateescape")
                if header.size == index[-1, 1]:
                    return index[1:]
        members = find_images(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None

    # if the cache is read-only or full, the next start indexes again
    with contextlib.suppress(UserError), atomic_path(cache) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate([stamp, members]))
    return members


def find_images(path: str) -> np.ndarray:
    """Indexes a shard from its headers; it may be several tars joined with `cat`.

    Python's tarfile stops at any block that is not a header, so `next_tar` checks what follows.
    """
    rows, start = [], 0
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path}: gzipped, so single images cannot be read; unpack it: gzip -dc {path} > NEW.tar")
        try:
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while member := tar.next():
                        if member.size < 0:
                            raise tarfile.ReadError("a negative size")
                        hidden = re.search(r"(^|/)\.[^./]", member.name)
                        if member.isreg() and suffix(member.name) in IMAGE_SUFFIXES and not hidden:
                            if member.issparse():  # its holes are not stored
                                raise UserError(f"{path}: {member.name} is sparse; create the tar without tar's -S")
                            rows.append((member.offset_data, member.size))
                        tar.members.clear()  # tarfile keeps a kilobyte per member
                start = next_tar(file, tar.offset)
        except UserError:
            raise
        except Exception as error:  # tarfile raises many kinds on a broken header
            raise UserError(f"{path}: not a complete tar file ({one_line(error)}); download it again") from None
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def next_tar(file, end: int) -> int | None:
    """The offset of the tar after the one that ends at byte `end`, or None. Only zeros may lie between them."""
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
