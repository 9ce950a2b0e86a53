"""The bad images of all ranks: one list, and one share that all of them judge alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from dinov2_equi.data.bad_images import BadImage
from dinov2_equi.distributed.collectives import gather_values, largest_of_ranks
from dinov2_equi.distributed.env import is_distributed


def gather_bad_images(mine: Sequence[BadImage], device: torch.device) -> list[BadImage]:
    """Return the bad images of all ranks in the order of the ranks, on every rank. Every rank must call it.

    In a step without any it costs one reduction of a number.

    Args:
        mine: Those of this rank.
        device: Where the process group communicates.
    """
    if not is_distributed():
        return list(mine)
    if largest_of_ranks(len(mine), device) == 0:
        return []
    of_ranks = gather_values([asdict(image) for image in mine], device)
    return [BadImage(**image) for images in of_ranks for image in images]
