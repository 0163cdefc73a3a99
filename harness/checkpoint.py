"""What a run needs to go on: the trained weights, the optimizer's state, and where it was. No pickle."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError, one_line
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
        kinds = dict(step=int, unreadable=int, images=str, settings=dict, code=list)
        whole = all(type(state[key]) is kind for key, kind in kinds.items())
        if not whole or min(state["step"], state["unreadable"]) < 0 or type(state["code"][-1]) is not dict:
            raise ValueError("not what a run writes")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/state.json: cannot be read ({one_line(error)}); remove the run to start anew") from None
    return state


def load_checkpoint(folder: str | os.PathLike, module: torch.nn.Module, optimizer=None) -> None:
    """Reads the tensors that `save_checkpoint` wrote into `module` and, if it is given, `optimizer`.

    Raises:
        UserError: they cannot be read, or are another model's.
    """
    folder = whole_checkpoint(folder)
    try:
        module.load_state_dict(load_file(folder / "weights.safetensors"))
        if optimizer:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            saved = optimizer.state_dict()
            for name, value in load_file(folder / "optimizer.safetensors").items():
                key, i = name.rsplit(".", 1)
                if value.ndim and value.shape != parameters[int(i)].shape:
                    raise ValueError("the optimizer's state is another model's")
                saved["state"].setdefault(int(i), {})[key] = value
            optimizer.load_state_dict(saved)
    except Exception as error:  # safetensors and torch raise their own
        raise UserError(f"{folder}: cannot be read ({one_line(error)}); remove the run to start anew") from None
