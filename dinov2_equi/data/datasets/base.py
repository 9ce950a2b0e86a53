"""What every data set of images offers, and the errors that they raise."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class DatasetError(ValueError):
    """A data set cannot be built or read as asked: the message says what was looked for and what to do."""


class UnreadableImageError(DatasetError):
    """One image file cannot be decoded: the message names the file.

    Args:
        message: The whole message.
        path: The file, or the name of the image where it has none; empty: unknown.
        reason: What is wrong with it; empty: the message says it.
    """

    # All but the message have defaults: an error of a loader process is built again from its message alone.
    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message


class ImageDataset(Protocol):
    """A fixed, ordered collection of RGB images, with class numbers where they are known."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def load(self, index: int) -> Image.Image:
        """Return image `index`, mode RGB, upright, at full resolution."""
        ...

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W], possibly shrunk to save decoding and resizing.

        A data set that is read channel by channel (`channels.ChannelImages`) returns float32 [C, H, W] in [0, 1].

        Args:
            index: Which image, 0 <= index < len(self).
            min_short_side: The data set may return a smaller version of an image whose shorter side is at least this
                many pixels, as long as the shorter side stays at least this long. None: full resolution.
        """
        ...

    def name(self, index: int) -> str:
        """Return a short, stable name of image `index`, such as its path below the root."""
        ...

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image, an index into `classes`; None where the images have no classes."""
        ...

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the class numbers; empty where the images have no classes."""
        ...


def image_to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, H, W], rows of interleaved pixels in memory (the fast layout for resizing)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def path_of(dataset: ImageDataset, index: int) -> str:
    """Return where image `index` is to be looked for, as messages say it; its name where the data set knows no path."""
    path: str = getattr(dataset, "path", dataset.name)(index)
    return path


def spread_indices(length: int, count: int) -> list[int]:
    """Return up to `count` of the numbers from 0 to `length` - 1, evenly spread, in order."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def check_index(index: int, length: int, what: str) -> None:
    """Raise IndexError unless 0 <= index < length.

    Raises:
        IndexError: Names the data set (`what`), the index and the length.
    """
    if not 0 <= index < length:
        raise IndexError(f"{what} holds {length} images, indices 0 to {length - 1}; got index {index}")
