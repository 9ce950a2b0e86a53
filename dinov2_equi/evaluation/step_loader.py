"""The samples of a training by position, divided among processes: for heads that are trained on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dinov2_equi.data.restarting_loader import RestartingLoader
from dinov2_equi.data.samplers import PositionSampler
from dinov2_equi.data.signals import start_worker
from dinov2_equi.distributed.env import get_rank, get_world_size, share_of_batch


def step_loader(
    samples: Dataset[Any],
    *,
    batch_size: int,
    start_step: int,
    num_steps: int,
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> RestartingLoader[Any]:
    """Return the batches of this process from a step to the end; its processes end with the first error.

    Args:
        samples: by position in the training.
        batch_size: of all processes together.
        start_step: first step, counted from 0.
        num_steps: of the whole training.
        num_workers: processes that load samples.
        collate: makes a batch of samples; None: torch's own.
    """

    def make_loader(first: int, count: int) -> DataLoader[Any]:
        sampler = steps_of_rank(batch_size, first, count)
        return DataLoader(
            samples, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, worker_init_fn=start_worker
        )

    return RestartingLoader(make_loader, start_step=start_step, num_steps=num_steps - start_step)


def steps_of_rank(batch_size: int, start_step: int, num_steps: int) -> PositionSampler:
    """Return which samples this process has in each step.

    Args:
        batch_size: of all processes together.
        start_step: first step, counted from 0.
        num_steps: from there.

    Raises:
        ValueError: the images of a step cannot be divided evenly.
    """
    return PositionSampler(
        batch_size=share_of_batch(batch_size),
        start_step=start_step,
        num_steps=num_steps,
        rank=get_rank(),
        world_size=get_world_size(),
    )
