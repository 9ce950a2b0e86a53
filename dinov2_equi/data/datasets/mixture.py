"""Several data sets as one, each with a fixed share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, check_index, path_of
from dinov2_equi.data.datasets.blocks import blocks_of


class Mixture:
    """Several data sets, one after the other; with weights, each is repeated until its share is that of its weight.

    An epoch holds every image of every part at least once. The images of a part occur equally often, up to one.
    Classes are kept where all parts have the same ones.

    Args:
        parts: The data sets; at least one.
        weights: One above 0 for each part, of any sum: its share of the images that are seen. None: no repetition, the
            shares are those of the sizes.

    Raises:
        DatasetError: No part, another number of weights, a weight that is not above 0, or a part that is to be read
            block by block.
    """

    def __init__(self, parts: Sequence[ImageDataset], weights: Sequence[float] | None = None) -> None:
        if not parts:
            raise DatasetError("a mixture needs at least one data set")
        if weights is not None and (len(weights) != len(parts) or min(weights) <= 0):
            raise DatasetError(f"expected {len(parts)} weights above 0, one for each part; got {list(weights)}")
        if any(blocks_of(part) is not None for part in parts):
            raise DatasetError(
                "shards that are read one after the other (pipe:, or buffer=) cannot be part of a mixture, whose "
                "images are taken in any order: copy them to a disk and leave out buffer="
            )
        self.parts = tuple(parts)
        self.weights = None if weights is None else tuple(weights)
        self._ends = np.cumsum(_repeated_lengths([len(part) for part in parts], weights))

    def __len__(self) -> int:
        """Return the number of images of an epoch, repetitions included."""
        return int(self._ends[-1])

    def load(self, index: int) -> Image.Image:
        """Return image `index`, mode RGB."""
        part, number = self._place(index)
        return part.load(number)

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W]."""
        part, number = self._place(index)
        return part.load_tensor(number, min_short_side)

    def name(self, index: int) -> str:
        """Return the name of image `index` in its part."""
        part, number = self._place(index)
        return part.name(number)

    def path(self, index: int) -> str:
        """Return where image `index` is to be looked for."""
        return path_of(*self._place(index))

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image; None where the parts have no classes, or not the same ones."""
        targets = [part.targets for part in self.parts]
        if any(part.classes != self.parts[0].classes for part in self.parts):
            return None
        lengths = np.diff(self._ends, prepend=0)
        known = [np.resize(part, length) for part, length in zip(targets, lengths, strict=True) if part is not None]
        return np.concatenate(known).tolist() if len(known) == len(targets) else None

    @property
    def classes(self) -> list[str]:
        """Class names; empty where `targets` is None."""
        classes = self.parts[0].classes
        return classes if all(part.classes == classes for part in self.parts) else []

    def _place(self, index: int) -> tuple[ImageDataset, int]:
        """Return the part that image `index` comes from, and its number there."""
        check_index(index, len(self), "the mixture")
        place = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[place]
        start = int(self._ends[place - 1]) if place else 0
        return part, (index - start) % len(part)


def _repeated_lengths(lengths: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Return how many images each part contributes to an epoch: as few as hold every image."""
    if weights is None:
        return list(lengths)
    scale = max(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [max(round(scale * weight), length) for length, weight in zip(lengths, weights, strict=True)]
