"""Reads weight files by their content, whatever their names. Pickled code is never executed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from harness.errors import UserError, one_line
from harness.hub import fetch

# OpenAI's and transformers' files hold these besides the weights
NO_WEIGHTS = re.compile(r"(.*\.)?(input_resolution|context_length|vocab_size|position_ids)")
WRAPPERS = re.compile(r"_(orig_mod|(fsdp|checkpoint)_wrapped_module)\.")  # torch adds these to names
FILES = ["open_clip_*.safetensors", "open_clip_*.bin", "model*.safetensors", "pytorch_model*.bin"]
FILES += ["*.safetensors", "*.bin", "*.pth"]  # the first pattern that a folder matches is used
Tensors = dict[str, torch.Tensor]


def read_tensors(source: str) -> Tensors:
    """The tensors of a file, a folder or `hf-hub:OWNER/NAME/PATH` by name; keys of nested dicts are joined with dots.

    Raises:
        UserError: it holds no dict of tensors, or a folder holds several models.
    """
    path = Path(source)
    if source.startswith("hf-hub:"):
        owner, name, inside = source.removeprefix("hf-hub:").split("/", 2)
        path = fetch(f"{owner}/{name}", inside, f"{inside}/*model*") / inside  # a file, or a folder
    tensors = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        tensors |= flatten(read_file(file))
    return {WRAPPERS.sub("", name): value for name, value in tensors.items() if not NO_WEIGHTS.fullmatch(name)}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights of one model: one file, or the shards NAME-0000i-of-0000n.

    Raises:
        UserError: there are none, or those of several models, or a shard is missing.
    """
    for pattern in FILES:
        names = sorted(file.name for file in folder.glob(pattern))
        if names:
            break
    else:
        raise UserError(f"{folder}: no weights in this folder ({', '.join(FILES)})")
    expected, shard = names[:1], re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", names[0])
    if shard:
        expected = [f"{shard[1]}-{i:05}-of-{shard[2]}{shard[3]}" for i in range(1, int(shard[2]) + 1)]
    if others := [name for name in names if name not in expected]:
        raise UserError(f"{folder}: holds both {names[0]} and {first_of(others)}; name the file itself")
    if missing := [name for name in expected if name not in names]:
        raise UserError(f"{folder}: missing shard {first_of(missing)}")
    return [folder / name for name in names]


def read_file(file: Path) -> dict:
    """Reads a safetensors or torch.save file, recognized by its first bytes.

    Raises:
        UserError: it has neither format, is broken, or holds something else.
    """
    try:
        refuse_placeholder(file)
        with open(file, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # safetensors, after the header's length
            return load_file(file)
        if head.startswith(b"PK"):  # a zip archive
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):  # as in OpenAI's own files
                    advice = "for OpenAI's weights use ARCH:openai, such as ViT-L-14:openai"
                    raise UserError(f"{file}: is a TorchScript program, which is not executed; {advice}")
        elif not head.startswith(b"\x80"):  # a pickle
            raise ValueError("neither a safetensors nor a torch.save file")
        with open(file, "rb") as opened, warnings.catch_warnings(action="ignore"):  # about torch's old file formats
            content = torch.load(opened, "cpu", weights_only=True)  # not by path: torch would look at the suffix
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict of tensors, got a {type(content).__name__}")
        return content
    except UserError:
        raise
    except pickle.UnpicklingError:  # its message suggests executing them
        raise UserError(f"{file}: contains pickled objects other than tensors, which are not executed") from None
    except Exception as error:  # torch and safetensors raise many kinds on a broken file
        raise UserError(f"{file}: could not be read as weights: {one_line(error).split('. ')[0]}") from error


def refuse_placeholder(file: Path) -> None:
    """Raises UserError for a git-lfs pointer, or a web page saved in place of weights."""
    with open(file, "rb") as opened:
        head = opened.read(100)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise UserError(f"{file}: is a web page (HTML or XML), not weights; download the file itself")


def flatten(content: dict, prefix: str = "") -> Tensors:
    """The tensors of nested dicts; their keys are joined with dots."""
    tensors = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{name}.")
    return tensors


def check_names(what: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]) -> None:
    """Raises UserError, beginning with `what`, if the weights do not fit the model."""
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen)):
        if names := sorted(names):
            raise UserError(f"{what}: {problem} weight {first_of(names)}")


def first_of(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
