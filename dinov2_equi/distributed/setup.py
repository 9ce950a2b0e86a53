"""Joining the processes that a launcher started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others: the first one may evaluate, or write a report."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    """Number of this process on its machine: of its GPU."""


def read_launch() -> Launch:
    """Return what torchrun (or anything else that sets its variables) says; one process where nothing is set.

    Raises:
        ValueError: if variables of a launcher are missing, or SLURM started several tasks without telling them apart.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={world_size}, but {', '.join(missing)} is not set: start the processes by "
                "torchrun --nproc-per-node N SCRIPT ..., or unset WORLD_SIZE"
            )
        return Launch(world_size, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
    num_tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if num_tasks > 1 and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"SLURM_NTASKS={num_tasks}: each task would write a run of its own into the same folder. Start one task a "
            "machine (--ntasks-per-node=1) that calls torchrun --nproc-per-node N SCRIPT ..."
        )
    return Launch()


@contextlib.contextmanager
def process_group(launch: Launch, device_type: str) -> Iterator[None]:
    """Join the other processes while the block lasts; a single process has nobody to join.

    Args:
        launch: of `read_launch`.
        device_type: `cuda` communicates through NCCL, `cpu` through gloo.
    """
    if launch.world_size == 1:
        yield
        return
    if device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
