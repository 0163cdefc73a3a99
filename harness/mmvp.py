"""The files of MMVP-VLM, and of any benchmark in its layout."""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from harness.errors import UserError, one_line

IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")


@dataclass(frozen=True)
class Pair:
    """Two images and their statements; `ids` and `type` as in the CSV."""

    ids: tuple[str, str]
    type: str
    statements: tuple[str, str]
    images: tuple[Path, Path]


def read_mmvp(source: str) -> list[Pair]:
    """Reads a benchmark in MMVP-VLM's layout, from a folder or the hub's data set `source`.

    The layout: Questions.csv with the header `Question ID,Type,Statement`, two rows a pair, and the images of both at
    `MLLM_VLM Images/<Type>/<Question ID>.jpg`. Types and pairs are whatever the CSV holds.

    Raises:
        UserError: anything that does not fit, with file and row.
    """
    folder = find_mmvp(source)
    questions = folder / "Questions.csv"
    root = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if root is None:
        raise UserError(f"{folder}: no image folder ({', '.join(IMAGE_FOLDERS)})")
    try:
        with open(questions, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, *(cell.strip() for cell in row)) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{questions}: cannot be read ({one_line(error)})") from None

    def refuse_if(wrong, number: int, why: str) -> None:
        if wrong:
            raise UserError(f"{questions}, row {number}: {why}")

    header = rows[0][1:] if rows else ()
    refuse_if(header != ("Question ID", "Type", "Statement"), 1, "the header must be Question ID,Type,Statement")
    for number, *row in rows[1:]:
        refuse_if(len(row) != 3 or not all(row), number, "needs an id, a type and a statement")
        refuse_if(not re.fullmatch("[0-9]{1,18}", row[0]), number, f"the id {row[0][:20]!r} is not a number")
    refuse_if(len(rows) < 3 or len(rows) % 2 == 0, rows[-1][0], "rows come in pairs, and this one has no partner")
    pairs, seen = [], set()
    for (number, id1, type1, statement1), (number2, id2, type2, statement2) in zip(rows[1::2], rows[2::2]):
        odd_and_new = int(id1) % 2 == 1 and int(id1) not in seen
        refuse_if(not odd_and_new, number, f"a pair begins with an odd id of its own, and this is {id1}")
        seen.add(int(id1))
        refuse_if(int(id2) != int(id1) + 1, number2, f"id {id2} does not follow its partner's, {id1}")
        refuse_if(type1 != type2, number2, f"type {type2!r} differs from its partner's, {type1!r}")
        place = type_folder(root, type1)
        refuse_if(place is None, number, f"type {type1[:50]!r} has no folder in {root}")
        images = (place / f"{id1}.jpg", place / f"{id2}.jpg")
        for image, row in zip(images, (number, number2)):
            refuse_if(not image.is_file(), row, f"no such image: {image}")
        pairs.append(Pair((id1, id2), type1.replace("_", " "), (statement1, statement2), images))
    return pairs


def find_mmvp(source: str) -> Path:
    """The folder of a benchmark: `source`, or that of the hub's data set `source`, fetched if need be."""
    if os.path.isdir(source):
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source}: no such folder; --mmvp takes a folder or the hub's data set MMVP/MMVP_VLM")
    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"data set {source} could not be fetched from the hub: {one_line(error)}") from error


def type_folder(root: Path, name: str) -> Path | None:
    """The folder of a type's images, with spaces or underscores; None if there is none in `root` itself."""
    names = (name, name.replace(" ", "_"), name.replace("_", " "))
    return next((path for path in root.iterdir() if path.name in names and path.is_dir()), None)
