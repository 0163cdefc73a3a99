"""Atomic writes, and the check of an output folder."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError, one_line


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `path` once it is complete and on disk.

    Works on disks without permissions or fsync, too.

    Raises:
        UserError: it cannot be written, for example on a full disk; `path` is unchanged.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with contextlib.suppress(OSError):
            temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read its files
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except UserError:
        raise
    except Exception as error:  # an OSError, or what safetensors, torch and transformers raise instead
        raise UserError(f"{path}: could not be written ({one_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Replaces a text file atomically. UserError: it cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")  # a file's name may not be valid UTF-8


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some network disks have no fsync
            raise
    finally:
        os.close(handle)


def check_writable(folder: str, option: str) -> None:
    """Raises UserError unless `folder`, the value of `option`, is a writable folder or can be created."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {folder}: {place} is a file; a folder is needed")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: no permission to write to {place}")
