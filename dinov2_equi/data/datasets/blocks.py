"""Data sets that are read in stretches: one shard after the other."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dinov2_equi.data.datasets.base import spread_indices


@dataclass(frozen=True)
class Blocks:
    """Successive stretches of a data set that are read together."""

    lengths: npt.NDArray[np.int64]
    """Images of each, [n], >= 0; the first ones are the first images of the data set."""
    buffer: int
    """Blocks that are in use together, >= 1."""


@runtime_checkable
class InBlocks(Protocol):
    """A data set that may want to be read block by block."""

    def blocks(self) -> Blocks | None:
        """Return its blocks; None where images may be read in any order."""


def blocks_of(dataset: object) -> Blocks | None:
    """Return the blocks in which a data set wants to be read, or None."""
    return dataset.blocks() if isinstance(dataset, InBlocks) else None


def spread_images(dataset: Sized, count: int) -> list[int]:
    """Return indices of up to `count` images of a data set, evenly spread, in order.

    Of one that is read block by block they lie in as few blocks, evenly spread, as hold so many, but in no fewer than
    are in use together: a block may have to be downloaded for a single image.
    """
    blocks = blocks_of(dataset)
    if blocks is None or count >= len(dataset):
        return spread_indices(len(dataset), count)
    filled = np.flatnonzero(blocks.lengths)
    starts = np.cumsum(blocks.lengths) - blocks.lengths
    least = min(blocks.buffer, len(filled))
    for num_blocks in range(least, len(filled) + 1):
        chosen = filled[spread_indices(len(filled), num_blocks)]
        if blocks.lengths[chosen].sum() >= count:
            break
    images = np.concatenate([np.arange(starts[block], starts[block] + blocks.lengths[block]) for block in chosen])
    found: list[int] = images[spread_indices(len(images), count)].tolist()
    return found
