"""Data sets that are read in stretches: one shard after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


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
