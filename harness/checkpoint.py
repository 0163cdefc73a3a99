"""The checkpoint of a run, one file: the trained weights, the optimizer's state, and the run's progress."""

import copy
from pathlib import Path

import torch

from harness.errors import UserError, one_line
from harness.files import atomic_path

STATE = dict(step=int, unreadable=int, images=str, settings=dict, code=list)  # the run's progress: names and types


def save_checkpoint(path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Replaces `path` atomically; `state` has the entries of STATE. UserError: it cannot be written."""
    with atomic_path(path) as temporary:
        torch.save(dict(state, weights=module.state_dict(), optimizer=optimizer.state_dict()), temporary)


def read_state(path: Path) -> dict | None:
    """The `state` of a checkpoint, or None if there is no checkpoint.

    Raises:
        UserError: it cannot be read, or an earlier version of this code saved it.
    """
    if not path.exists():
        if path.with_suffix("").is_dir():
            raise UserError(f"{path.parent}: written by an earlier version, so it cannot be resumed; remove the folder")
        return None
    saved = read_checkpoint(path)
    return {key: saved[key] for key in STATE}


def load_checkpoint(path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Loads a checkpoint into `module` and, if it is given, `optimizer`. Returns the number of steps taken.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    saved = read_checkpoint(path)
    try:
        module.load_state_dict(saved["weights"])
        if optimizer:
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # else the optimizer keeps the file mapped
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: does not fit this model ({one_line(error)})") from None
    return saved["step"]


def read_checkpoint(path: Path) -> dict:
    """The whole content of a checkpoint, on the CPU, mapped from the file. UserError: it cannot be read."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(type(saved[key]) is kind for key, kind in STATE.items()) or type(saved["code"][-1]) is not dict:
            raise ValueError("it is not the checkpoint of a run")
        return saved
    except Exception as error:  # torch and pickle raise many kinds
        raise UserError(f"{path}: cannot be read ({one_line(error)}); remove the run to start over") from None
