"""What files of weights hold, by their bytes and whatever they are called. Nothing that is pickled is executed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file

from harness.errors import UserError, one_line

NO_WEIGHTS = re.compile(r"(.*\.)?(input_resolution|context_length|vocab_size|position_ids)")  # OpenAI's, transformers'
WRAPPERS = re.compile(r"_(orig_mod|(fsdp|checkpoint)_wrapped_module)\.")  # torch's, of single blocks
FILES = ["open_clip_*.safetensors", "open_clip_*.bin", "model*.safetensors", "pytorch_model*.bin"]  # of a folder, in
FILES += ["*.safetensors", "*.bin", "*.pth"]  # this order
OPENAI = {257: "openai-vit-l-14-224", 577: "openai-vit-l-14-336"}  # tokens of OpenAI's own ViT-L-14 → the recipe
Tensors = dict[str, torch.Tensor]


def read_tensors(source: str) -> Tensors:
    """What the file, or the files of the folder, hold by name; dicts inside dicts give names with dots.

    Raises:
        UserError: it is not a dict of tensors, or it is not clear which files are meant.
    """
    path = fetch(source) if source.startswith("hf-hub:") else Path(source)
    tensors = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        tensors |= flat(read_file(file))
    return {WRAPPERS.sub("", name): value for name, value in tensors.items() if not NO_WEIGHTS.fullmatch(name)}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold one model's weights: one, or the parts NAME-0000i-of-0000n.

    Raises:
        UserError: there are none, or of several models, or a part is missing.
    """
    for pattern in FILES:
        names = sorted(file.name for file in folder.glob(pattern))
        if names:
            break
    else:
        raise UserError(f"{folder}: no weights in this folder ({', '.join(FILES)})")
    expected, part = names[:1], re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", names[0])
    if part:
        expected = [f"{part[1]}-{i:05}-of-{part[2]}{part[3]}" for i in range(1, int(part[2]) + 1)]
    if others := [name for name in names if name not in expected]:
        raise UserError(f"{folder}: are the weights in {names[0]} or in {first_of(others)}? name the file itself")
    if missing := [name for name in expected if name not in names]:
        raise UserError(f"{folder}: a part of the weights is missing: {first_of(missing)}")
    return [folder / name for name in names]


def read_file(file: Path) -> dict:
    """What safetensors or torch.load makes of a file, by its bytes, whatever its name.

    Raises:
        UserError: it is neither's, or broken, or holds something else.
    """
    try:
        refuse_placeholder(file)
        with open(file, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # safetensors, after the header's length
            return load_file(file)
        if head.startswith(b"PK"):
            refuse_torchscript(file)
        elif not head.startswith(b"\x80"):  # a pickle
            raise ValueError("it is neither of safetensors nor of torch.save")
        with open(file, "rb") as opened, warnings.catch_warnings(action="ignore"):  # about old forms of torch's files
            content = torch.load(opened, "cpu", weights_only=True)  # opened, as torch would go by the name
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
        return content
    except UserError:
        raise
    except pickle.UnpicklingError:  # its message advises to execute them
        raise UserError(f"{file}: holds pickled objects that are no tensors; nothing pickled is executed") from None
    except Exception as error:  # whatever torch and safetensors make of a broken file
        raise UserError(f"{file}: could not be read as weights: {one_line(error).split('. ')[0]}") from error


def refuse_placeholder(file: Path) -> None:
    """UserError for what lies in the place of weights after a clone without git-lfs, or after a failed download."""
    with open(file, "rb") as opened:
        head = opened.read(100)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file}: is a pointer of git-lfs, not the weights; `git lfs pull` in its folder fetches them")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise UserError(f"{file}: is a web page (HTML or XML), not weights; download the file itself")


def refuse_torchscript(file: Path) -> None:
    """UserError for a TorchScript program, in which OpenAI publishes its CLIPs; it says where the weights are."""
    with zipfile.ZipFile(file) as archive:
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
    if "constants.pkl" in sizes:
        known = "ARCH:openai, such as ViT-B-16:openai"
        for positions, recipe in OPENAI.items():
            if positions * 1024 * 2 in sizes.values():  # bytes of the positional embedding, in fp16
                known = f"the recipe {recipe}"
        raise UserError(f"{file}: is a TorchScript program, and is not executed; the weights of OpenAI's: {known}")


def flat(content: dict, prefix: str = "") -> Tensors:
    """Tensors by name; those of a dict under a name have it and a dot before theirs."""
    tensors = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{name}.")
    return tensors


def first_of(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more such names)" if len(names) > 1 else "")


def fetch(source: str) -> Path:
    """The local copy of `hf-hub:OWNER/NAME/PATH`, a file of a hub's repository or a folder in it."""
    owner, name, path = source.removeprefix("hf-hub:").split("/", 2)
    try:
        if path.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors")):
            return Path(hf_hub_download(f"{owner}/{name}", path))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=f"{path}/*model*")) / path
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{source} could not be fetched from the hub: {one_line(error)}") from error
