"""What a run needs to go on: the trained weights, the optimizer's state, and where it was. No pickle."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError, brief
from harness.files import replaced_folder


def save_checkpoint(folder: str | os.PathLike, module: torch.nn.Module, optimizer, state: dict) -> None:
    """Writes the weights of `module`, the optimizer's tensors and `state` (JSON); replaces the folder whole."""
    buffers = {
        f"{key}.{i}": value.contiguous()
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if torch.is_tensor(value)
    }
    with replaced_folder(folder) as new:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, new / "weights.safetensors")
        save_file(buffers, new / "optimizer.safetensors")
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def whole_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint to go on from: `folder`, or FOLDER.old where a save was cut off between its two renames."""
    return next((f for f in (Path(folder), Path(f"{folder}.old")) if f.exists()), None)


def read_state(folder: str | os.PathLike) -> dict | None:
    """The `state` of the checkpoint there; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    if (folder := whole_checkpoint(folder)) is None:
        return None
    try:
        state = json.loads((folder / "state.json").read_text())
        counts = [state["step"], state["unreadable"], state["images"]]
        if not isinstance(state["args"], dict) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("not what a run writes")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/state.json: cannot be read ({brief(error)}); remove the run to start anew") from None
    return state


def load_checkpoint(folder: str | os.PathLike, module: torch.nn.Module, optimizer) -> None:
    """Reads the tensors that `save_checkpoint` wrote into `module` and `optimizer`.

    Raises:
        UserError: they cannot be read, or are another model's.
    """
    folder = whole_checkpoint(folder)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        weights, buffers = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
        saved = optimizer.state_dict()
        for name, value in buffers.items():
            key, i = name.rsplit(".", 1)
            if value.ndim and value.shape != parameters[int(i)].shape:
                raise ValueError("the optimizer's state is another model's")
            saved["state"].setdefault(int(i), {})[key] = value
        module.load_state_dict(weights)
        optimizer.load_state_dict(saved)
    except Exception as error:  # safetensors and torch raise their own
        raise UserError(f"{folder}: cannot be read ({brief(error)}); remove the run to start anew") from None
