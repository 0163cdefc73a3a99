"""Reads MMVP-VLM, or another benchmark in its layout."""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError, one_line
from harness.hub import fetch

IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")
HEADER = ["Question ID", "Type", "Statement"]


@dataclass(frozen=True)
class Pair:
    """Two images and their statements; `ids` and `type` as in the CSV."""

    ids: tuple[str, str]
    type: str
    statements: tuple[str, str]
    images: tuple[Path, Path]


class Row(NamedTuple):
    """A row of the CSV; `place` is its file and number, for error messages."""

    place: str
    id: str
    type: str
    statement: str


def read_mmvp(source: str) -> list[Pair]:
    """Reads a benchmark from the folder `source`, or from the data set `source` on the hub.

    The layout is MMVP-VLM's: Questions.csv with the header `Question ID,Type,Statement` and two rows per pair (an odd
    id and the next one), images at `MLLM_VLM Images/<Type>/<Question ID>.jpg`. Any types and counts are accepted.

    Raises:
        UserError: a file is missing or does not fit the layout; the error names the file and the row.
    """
    if not os.path.isdir(source) and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise UserError(f"{source}: no such folder; --mmvp takes a folder or a data set on the hub, MMVP/MMVP_VLM")
    folder = Path(source) if os.path.isdir(source) else fetch(source, kind="dataset")
    image_folder = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if image_folder is None:
        raise UserError(f"{folder}: no image folder ({', '.join(IMAGE_FOLDERS)})")
    rows, pairs = read_questions(folder / "Questions.csv"), {}
    for first, second in zip(rows[::2], rows[1::2]):
        if int(first.id) in pairs:
            raise UserError(f"{first.place}: the id {first.id} is already in use")
        pairs[int(first.id)] = read_pair(first, second, image_folder)
    return list(pairs.values())


def read_questions(path: Path) -> list[Row]:
    """The rows of Questions.csv below its header. Checks each row, and that their number is even."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(f"{path}, row {reader.line_num}", [cell.strip() for cell in line]) for line in reader if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if not lines or lines[0][1] != HEADER:
        raise UserError(f"{path}, row 1: the header must be {','.join(HEADER)}")
    for place, cells in lines[1:]:
        if len(cells) != 3 or not all(cells):
            raise UserError(f"{place}: needs an id, a type and a statement")
        if not re.fullmatch("[0-9]{1,18}", cells[0]):
            raise UserError(f"{place}: the id {cells[0][:20]!r} is not a number")
    if len(lines) < 3 or len(lines) % 2 == 0:
        raise UserError(f"{lines[-1][0]}: rows come in pairs, but this one has no partner")
    return [Row(place, *cells) for place, cells in lines[1:]]


def read_pair(first: Row, second: Row, image_folder: Path) -> Pair:
    """Checks that two rows are a pair, and that both images are in the folder of their type."""
    if int(first.id) % 2 == 0:
        raise UserError(f"{first.place}: a pair begins with an odd id, not with {first.id}")
    if int(second.id) != int(first.id) + 1:
        raise UserError(f"{second.place}: id {second.id} does not follow its partner's, {first.id}")
    if first.type != second.type:
        raise UserError(f"{second.place}: type {second.type!r} differs from its partner's, {first.type!r}")
    names = (first.type, first.type.replace(" ", "_"), first.type.replace("_", " "))
    folder = next((path for path in image_folder.iterdir() if path.name in names and path.is_dir()), None)
    if folder is None:
        raise UserError(f"{first.place}: type {first.type[:50]!r} has no folder in {image_folder}")
    images = (folder / f"{first.id}.jpg", folder / f"{second.id}.jpg")
    for row, image in zip((first, second), images):
        if not image.is_file():
            raise UserError(f"{row.place}: no such image: {image}")
    return Pair((first.id, second.id), first.type.replace("_", " "), (first.statement, second.statement), images)
