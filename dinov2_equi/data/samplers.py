"""Which image stands at which position of a training, and which positions make up a step.

A position counts the images that all ranks together have taken since the start. Everything random about the data is
a pure function of (seed, position): a resumed run goes on at the next position, and nothing has to be replayed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_PHILOX_BLOCK = 4  # numbers of 64 bits
_FLOAT32_BITS = 24  # of the significand: more would round up to 1
_WORD_BITS = 64
_WORD_MASK = 0xFFFFFFFFFFFFFFFF
_MAX_SAMPLES = 2**62
_NUM_ROUNDS = 12
_LEAST_BITS = 6  # with fewer, some orders of a few images come more often than others


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

    Position p is the image that a permutation, keyed by (seed, epoch `p // num_samples`), gives for
    `p % num_samples`. Nothing is shuffled and nothing is kept: an epoch starts, and a run resumes anywhere, at the cost
    of one image's number, some microseconds.

    Args:
        num_samples: Number of images in the data set.
        seed: Seed of the run.

    Raises:
        ValueError: num_samples < 1, or above 2^62.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 1 <= num_samples <= _MAX_SAMPLES:
            raise ValueError(f"an order needs 1 to {_MAX_SAMPLES} images; got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation: KeyedPermutation | None = None

    def index(self, position: int) -> int:
        """Return the number of the image that stands at `position` >= 0."""
        epoch, offset = divmod(position, self.num_samples)
        if self._permutation is None or epoch != self._epoch:
            entropy = np.random.SeedSequence((self.seed, int(RandomStream.ORDER), epoch))
            keys = entropy.generate_state(_NUM_ROUNDS, np.uint64).tolist()
            self._epoch, self._permutation = epoch, KeyedPermutation(self.num_samples, keys)
        return self._permutation(offset)


class BlockOrder:
    """The endless order of a data set that is read block by block, such as shard by shard.

    In each epoch the blocks follow each other in an order of their own, `buffer` of them make a window, and the images
    of a window are shuffled. Position p depends on (seed, p) alone: a run resumes anywhere, and only the blocks of one
    window are in use at a time.

    Args:
        lengths: Images of each block, [n], >= 0.
        buffer: Blocks of a window, >= 1.
        seed: Seed of the run.

    Raises:
        ValueError: No image, or buffer < 1.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], buffer: int, seed: int) -> None:
        self.num_samples = int(lengths.sum())
        if self.num_samples < 1 or buffer < 1:
            raise ValueError(f"an order needs images and a buffer of 1 or more; got {self.num_samples} and {buffer}")
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths
        self._buffer = buffer
        self.seed = seed
        self._epoch = -1
        self._blocks: list[int] = []
        self._ends = np.zeros(0, np.int64)  # of the blocks, in the order of the epoch
        self._window = -1
        self._permutation: KeyedPermutation | None = None

    def index(self, position: int) -> int:
        """Return the number of the image that stands at `position` >= 0."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        window = int(np.searchsorted(self._ends, offset, side="right")) // self._buffer
        first = window * self._buffer
        start = int(self._ends[first - 1]) if first else 0
        if window != self._window or self._permutation is None:
            end = int(self._ends[min(first + self._buffer, len(self._ends)) - 1])
            self._window = window
            self._permutation = KeyedPermutation(end - start, self._keys(epoch, window + 1))
        place = start + self._permutation(offset - start)
        number = int(np.searchsorted(self._ends, place, side="right"))
        block = self._blocks[number]
        return int(self._starts[block]) + place - (int(self._ends[number]) - int(self._lengths[block]))

    def _start_epoch(self, epoch: int) -> None:
        count = len(self._lengths)
        permutation = KeyedPermutation(count, self._keys(epoch, 0))
        self._epoch, self._window = epoch, -1
        self._blocks = [permutation(number) for number in range(count)]
        self._ends = np.cumsum(self._lengths[self._blocks])

    def _keys(self, epoch: int, number: int) -> list[int]:
        entropy = np.random.SeedSequence((self.seed, int(RandomStream.ORDER), epoch, number))
        keys: list[int] = entropy.generate_state(_NUM_ROUNDS, np.uint64).tolist()
        return keys


class KeyedPermutation:
    """A permutation of the numbers 0 .. length - 1 that is computed number by number.

    A Feistel network permutes the 2^b numbers of b bits, the fewest that count `length`: a number is cut into two
    halves, and in turn each is combined (exclusive or) with a hash of the other. Where that leads out of the range, it
    is repeated until it leads back, less than once on average.

    Args:
        length: How many numbers, 1 to 2^62.
        keys: One of 64 bits for each round, at least four.

    Source: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988; the
    repetition ("cycle walking"): Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """

    def __init__(self, length: int, keys: Sequence[int]) -> None:
        self._length = length
        num_bits = max((length - 1).bit_length(), _LEAST_BITS)
        self._low_bits = num_bits // 2
        high_bits = num_bits - self._low_bits
        self._low_mask = (1 << self._low_bits) - 1
        self._shifts = (_WORD_BITS - high_bits, _WORD_BITS - self._low_bits)
        self._rounds = list(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, number: int) -> int:
        """Return what stands in place of a number, 0 <= number < length."""
        while True:
            number = self._permute(number)
            if number < self._length:
                return number

    def _permute(self, number: int) -> int:
        high, low = number >> self._low_bits, number & self._low_mask
        to_high, to_low = self._shifts
        for first, second in self._rounds:
            high ^= _hash(low ^ first) >> to_high
            low ^= _hash(high ^ second) >> to_low
        return high << self._low_bits | low


def _hash(word: int) -> int:
    """Return 64 bits, of which the upper ones depend on all bits of a word of 64 bits.

    Source: the mixing function of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD_MASK
    return (word ^ word >> 27) * 0x94D049BB133111EB & _WORD_MASK


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
