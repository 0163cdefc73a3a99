"""Joining the processes that torchrun starts, and their order."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness.errors import UserError


def join_processes() -> torch.device:
    """Joins torchrun's process group, or creates a group of one; returns this process's device.

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
    return device


@contextlib.contextmanager
def main_first():
    """The main process goes through the block before the others: they find what it has checked and indexed."""
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
