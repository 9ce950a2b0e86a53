"""Which image stands at which position of a training, and which positions make up a step.

A position counts the images that all ranks together have taken since the start. Everything random about the data is
a pure function of (seed, position): a resumed run goes on at the next position, and nothing has to be replayed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_PHILOX_BLOCK = 4  # numbers of 64 bits
_FLOAT32_BITS = 24  # of the significand: more would round up to 1


class RandomStream(enum.IntEnum):
    """Uses of random numbers; each has its own stream, independent of the others for any seed."""

    ORDER = 0
    AUGMENTATION = 1
    MASKS = 2
    """How many patches of each crop of a step are masked."""
    PATCHES = 3
    """Which patches the equivariance branch reconstructs."""
    THETA = 4
    """The transforms of the second views."""
    MASK_SHAPES = 5
    """Which patches of a crop are masked, once it is known how many."""
    RANK = 6
    """What a process draws beside the data: stochastic depth."""
    REPLACEMENT = 7
    """Which images stand in for one that cannot be used."""


def random_generator(stream: RandomStream, seed: int, number: int) -> np.random.Generator:
    """Return a generator that depends on its three arguments alone.

    Args:
        stream: What the numbers are for.
        seed: Seed of the run, >= 0.
        number: Position or epoch, >= 0.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, int(stream), number)))


def random_uniforms(stream: RandomStream, seed: int, positions: Tensor, count: int) -> Tensor:
    """Return numbers in [0, 1) for each position that depend on (stream, seed, position) alone: float32 [B, count].

    All positions of a step by one call, in microseconds: Philox numbers its blocks of four, and a position has its own.

    Args:
        stream: What the numbers are for.
        seed: Seed of the run, >= 0.
        positions: [B] int64, >= 0.
        count: Numbers for each.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    key = np.random.SeedSequence((seed, int(stream))).generate_state(2, np.uint64)
    blocks = -(-count // _PHILOX_BLOCK)
    parts = [np.empty((0, count), np.uint64)]
    for first, length in _runs(positions.tolist()):
        generator = np.random.Philox(key=key, counter=first * blocks)
        parts.append(generator.random_raw(length * blocks * _PHILOX_BLOCK).reshape(length, -1)[:, :count])
    highest_bits = np.concatenate(parts) >> np.uint64(64 - _FLOAT32_BITS)
    return torch.from_numpy(highest_bits.astype(np.float32) * np.float32(2.0**-_FLOAT32_BITS))


def _runs(positions: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, length) of each stretch of positions that follow upon each other."""
    start = 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] != positions[end - 1] + 1:
            yield positions[start], end - start
            start = end


class SampleOrder:
    """The endless order in which the images of a data set are taken: epoch after epoch, each in its own order.

    Position p is entry `p % num_samples` of the permutation drawn from (seed, epoch `p // num_samples`).

    Args:
        num_samples: Number of images in the data set.
        seed: Seed of the run.

    Raises:
        ValueError: num_samples < 1, or more images than 32-bit indices can count.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 1 <= num_samples <= np.iinfo(np.int32).max:
            raise ValueError(f"an order needs 1 to {np.iinfo(np.int32).max} images; got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._permutations: dict[int, npt.NDArray[np.int32]] = {}

    def index(self, position: int) -> int:
        """Return the number of the image that stands at `position` >= 0."""
        epoch, offset = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[offset])

    def _permutation(self, epoch: int) -> npt.NDArray[np.int32]:
        if epoch not in self._permutations:
            # Two epochs are kept: a batch, or the workers' look-ahead, may reach over the border between them.
            self._permutations = {kept: order for kept, order in self._permutations.items() if kept == epoch - 1}
            rng = random_generator(RandomStream.ORDER, self.seed, epoch)
            self._permutations[epoch] = rng.permutation(np.arange(self.num_samples, dtype=np.int32))
        return self._permutations[epoch]


class PositionSampler:
    """The positions that one rank takes in each step: a batch sampler for a DataLoader.

    Step s of rank r, of W ranks with b images each, takes positions (s*W + r)*b to (s*W + r)*b + b - 1.

    Args:
        batch_size: Images of one rank in one step, b.
        start_step: First step, counted from the start of the training.
        num_steps: Number of steps from there.
        rank: This process, r.
        world_size: Number of processes, W.

    Raises:
        ValueError: batch_size < 1, a negative step or count, or a rank outside [0, world_size).
    """

    def __init__(self, *, batch_size: int, start_step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}")
        if start_step < 0 or num_steps < 0:
            raise ValueError(f"start_step and num_steps must be >= 0; got {start_step} and {num_steps}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size); got rank {rank} of {world_size}")
        self.batch_size = batch_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each step."""
        for step in range(self.start_step, self.start_step + self.num_steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
