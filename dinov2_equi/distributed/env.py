"""Who this process is among the processes of the run."""

from __future__ import annotations

import os

import torch.distributed as dist


def is_distributed() -> bool:
    """Return whether a process group is initialised (False in a plain single process)."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return this process's rank in the default group, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes in the default group, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def get_local_world_size() -> int:
    """Return the number of the run's processes on this machine, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or get_world_size()


def is_main_process() -> bool:
    """Return whether this is rank 0, the only process that speaks and writes shared files."""
    return get_rank() == 0


def share_of_rank(count: int) -> range:
    """Return which of `count` things this process does: every W-th, so that all are done by one."""
    return range(get_rank(), count, get_world_size())


def share_of_batch(batch_size: int, world_size: int = 0) -> int:
    """Return how many images of a batch of all processes one process has.

    Args:
        batch_size: of all together.
        world_size: how many they are; 0: those of the default group.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    world_size = world_size or get_world_size()
    if batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} counts the images of all processes: take a multiple of {world_size}, as many as "
            "there are"
        )
    return batch_size // world_size
