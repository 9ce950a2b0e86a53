"""Splitting a data set into a part to train on and a part held back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, check_index, path_of
from dinov2_equi.data.datasets.blocks import Blocks, blocks_of, spread_images
from dinov2_equi.data.datasets.mixture import Mixture


class Subset:
    """A view of some images of a data set, in the order of `indices`; nothing is copied.

    Args:
        dataset: The data set looked into.
        indices: [n] whole numbers, which of its images.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        for index in self.indices[(self.indices < 0) | (self.indices >= len(dataset))]:
            check_index(int(index), len(dataset), "the data set")

    def __len__(self) -> int:
        """Return the number of images in the view."""
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        """Return image `index` of the view, mode RGB."""
        return self.dataset.load(self._source_index(index))

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` of the view as uint8 [3, H, W]."""
        return self.dataset.load_tensor(self._source_index(index), min_short_side)

    def blocks(self) -> Blocks | None:
        """Return what the blocks of the data set have left; None without blocks, or for a view in another order."""
        whole = blocks_of(self.dataset)
        if whole is None or np.any(np.diff(self.indices) < 0):
            return None
        ends = np.searchsorted(self.indices, np.cumsum(whole.lengths))
        return Blocks(np.diff(ends, prepend=0), whole.buffer)

    def name(self, index: int) -> str:
        """Return the name of image `index` of the view."""
        return self.dataset.name(self._source_index(index))

    def path(self, index: int) -> str:
        """Return where image `index` of the view is to be looked for."""
        return path_of(self.dataset, self._source_index(index))

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image of the view, numbered as in the whole data set."""
        targets = self.dataset.targets
        return None if targets is None else [targets[index] for index in self.indices]

    @property
    def classes(self) -> list[str]:
        """Class names of the whole data set."""
        return self.dataset.classes

    def _source_index(self, index: int) -> int:
        check_index(index, len(self), "this subset")
        return int(self.indices[index])


def evenly_spread(dataset: ImageDataset, max_images: int) -> ImageDataset:
    """Return a view of up to `max_images` images, evenly spread over a data set, which may have fewer."""
    if len(dataset) <= max_images:
        return dataset
    return Subset(dataset, spread_images(dataset, max_images))


def split_holdout(dataset: ImageDataset, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Return (train, holdout): disjoint views that together hold every image, each in the order of the data set.

    With classes the held-back share is the same in each class up to rounding. Each part holds at least one image;
    a pure function of (targets or length, fraction, seed).

    Args:
        dataset: At least two images.
        fraction: Share held back, 0 < fraction < 1.
        seed: Which images are held back.

    Raises:
        DatasetError: fraction outside (0, 1), or fewer than two images.
    """
    if not 0.0 < fraction < 1.0:
        raise DatasetError(f"the share held back must lie between 0 and 1 (both excluded); got {fraction}")
    if len(dataset) < 2:
        raise DatasetError(
            f"cannot hold images back from a data set of {len(dataset)}: at least 2 are needed. "
            "Add images, or hold none back."
        )
    num_held = min(max(round(fraction * len(dataset)), 1), len(dataset) - 1)
    held = np.zeros(len(dataset), dtype=bool)
    held[_stratified_order(dataset.targets, len(dataset), seed)[:num_held]] = True
    return Subset(dataset, np.flatnonzero(~held)), Subset(dataset, np.flatnonzero(held))


def hold_back(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Return (train, holdout) as `split_holdout` does; of a mixture each part is split, since it repeats images."""
    if not isinstance(dataset, Mixture):
        return split_holdout(dataset, fraction, seed)
    split = [split_holdout(part, fraction, seed) for part in dataset.parts]
    kept, held = zip(*split, strict=True)
    return Mixture(kept, dataset.weights), Mixture(held)


def _stratified_order(targets: list[int] | None, length: int, seed: int) -> np.ndarray:
    """Return a permutation of range(length), any prefix of which holds the classes in proportion, up to rounding."""
    order = np.random.default_rng([seed, length]).permutation(length)
    if targets is None:
        return order
    classes = np.asarray(targets)[order]
    # The r-th of the n images of a class gets the key (r + 1/2) / n: classes advance together. The sort is stable, so
    # ties keep their random order.
    by_class = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank_in_class = np.arange(length) - np.repeat(starts, counts)
    keys = np.empty(length)
    keys[by_class] = (rank_in_class + 0.5) / np.repeat(counts, counts)
    return np.asarray(order[np.argsort(keys, kind="stable")])
