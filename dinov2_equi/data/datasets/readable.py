"""A data set for measurements and pictures that goes on past images that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.view import View

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

_ATTEMPTS = 64


class ReadableImages(View[ImageDataset]):
    """A view of a data set where the next readable image of the same class stands in for an unreadable one.

    Each unreadable image is logged once. Names, class numbers and length are those of the data set.

    Args:
        dataset: The data set looked into.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(dataset)
        self._targets = None if dataset.targets is None else np.asarray(dataset.targets, dtype=np.int32)
        self._reported: set[int] = set()

    def load(self, index: int) -> Image.Image:
        """Return image `index`, mode RGB, or the one that stands in for it.

        Raises:
            DatasetError: None of the next images can be read.
        """
        return self._first_readable(index, self.dataset.load)

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W], or the one that stands in for it.

        Raises:
            DatasetError: None of the next images can be read.
        """
        return self._first_readable(index, lambda number: self.dataset.load_tensor(number, min_short_side))

    def _first_readable(self, index: int, load: Callable[[int], Loaded]) -> Loaded:
        last = ""
        for number in self._candidates(index):
            try:
                return load(number)
            except UnreadableImageError as error:
                last = str(error)
                if number not in self._reported:
                    self._reported.add(number)
                    logger.warning("%s Another image is used.", last)
        raise DatasetError(f"no image from number {index} on can be read; the last fault: {last}")

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self._targets is None:
            following = (np.arange(index + 1, index + _ATTEMPTS) % len(self)).tolist()
        else:
            same = np.flatnonzero(self._targets == self._targets[index])
            following = np.roll(same, -int(np.searchsorted(same, index)) - 1)[:-1][:_ATTEMPTS].tolist()
        yield from following
