"""Files and folders that have their name only once they are whole."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from harness.errors import UserError, one_line


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike):
    """Yields an empty folder that takes the place of `folder` once the block has filled it.

    At every instant there is a whole one, on the disk and not only on its way there: `folder` or FOLDER.old.

    Raises:
        UserError: it cannot be written, as on a full disk; what was there before is whole.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with contextlib.suppress(OSError):  # not every disk knows rights
                path.chmod(new.stat().st_mode & 0o666)  # safetensors' files are for their owner alone
        for path in (*new.iterdir(), new):
            synchronise(path)
        if replaced := folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        synchronise(folder.parent)
    except BaseException as error:  # an OSError, or whatever safetensors and transformers make of it
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, UserError) or not isinstance(error, Exception):  # the block's own sentence, or Ctrl-C
            raise
        raise UserError(f"{folder} could not be written: {one_line(error)}; what it held before is whole") from error
    if replaced:  # else the old one is not ours
        shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, content: str) -> None:
    """Writes a text file by way of PATH.part."""
    part = path.with_suffix(".part")
    try:
        part.write_text(content, encoding="utf-8", errors="replace")  # names of files may be no text
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk, where the disk can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # as for folders on some network disks
            raise
    finally:
        os.close(handle)


def check_renames(folder: Path) -> None:
    """UserError unless folders in `folder` can be renamed: without that nothing could be saved."""
    new, old = folder / "trial.new", folder / "trial"
    try:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)
        new.mkdir()
        new.rename(old)
        old.rmdir()
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(
            f"--out {folder}: its disk cannot rename folders ({one_line(error)}), so no run can be kept"
        ) from None


def check_writable(folder: str, option: str) -> None:
    """UserError unless `folder`, given as `option`, is or can become a folder that may be written to."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {folder}: {place} is a file; a folder is needed")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {place} may not be written to")
