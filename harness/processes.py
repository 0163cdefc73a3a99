"""Joining the processes that torchrun starts, and their order."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness.errors import UserError


@contextlib.contextmanager
def joined_processes() -> Iterator[torch.device]:
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
def main_first() -> Iterator[bool]:
    """The main process goes through the block before the others, which find what it has checked and indexed.

    Yields whether this is the main process.
    """
    main = dist.get_rank() == 0
    if not main:
        dist.barrier()
    yield main
    if main:
        dist.barrier()


def everyone(mine) -> list:
    """A value of each process, in all of them."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values


def copy_to(device: torch.device, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Copies on `device`, made without waiting for it; None stays None."""
    pinned = [t.pin_memory() if device.type == "cuda" and t is not None else t for t in tensors]
    return [t if t is None else t.to(device, non_blocking=True) for t in pinned]
