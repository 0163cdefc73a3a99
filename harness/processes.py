"""Joining the processes that torchrun starts, and their order."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness.errors import UserError


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins torchrun's process group, or makes a group of one, for the block; yields this process's device.

    Raises:
        UserError: there are more processes than GPUs on this node.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs of this node")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    store, rank, processes = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, processes = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # on one node a restart finds the old keys
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is on the CPU waits for no GPU
    hour = datetime.timedelta(hours=1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=hour)
    failed = True
    try:
        yield device
        dist.barrier()
        failed = False
    finally:
        if processes == 1 or not failed:  # a notebook can go on after a mistake; others might wait here for ever
            dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Rank 0 runs the block before the other ranks do; yields whether this is rank 0."""
    is_rank_zero = dist.get_rank() == 0
    if not is_rank_zero:
        dist.barrier()
    yield is_rank_zero
    if is_rank_zero:
        dist.barrier()


def all_gather_object(value) -> list:
    """The `value` of every process, in rank order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def copy_to_device(tensor: torch.Tensor | np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on `device`, without waiting for what a GPU is computing."""
    tensor = torch.as_tensor(tensor)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
