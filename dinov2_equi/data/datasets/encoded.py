"""Data sets whose images lie encoded, in files or as bytes: what they share."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.decode import decode_rgb, decode_tensor


class EncodedImages(ABC):
    """Images that are decoded when they are asked for; a sub-class says where they lie."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def encoded(self, index: int) -> Path | bytes:
        """Return the file of image `index`, or what would be in it.

        Raises:
            IndexError: There is no such image.
            UnreadableImageError: It cannot be read; names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a short, stable name of image `index`."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return where image `index` is to be looked for, as messages say it."""

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image; None without classes."""
        return None

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the class numbers; empty without classes."""
        return []

    def load(self, index: int) -> Image.Image:
        """Return image `index` as upright RGB.

        Raises:
            UnreadableImageError: The image cannot be decoded; names the file.
        """
        encoded = self.encoded(index)
        return decode_rgb(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, self.path(index))

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W]; large JPEGs are decoded at a fraction of their size.

        Raises:
            UnreadableImageError: The image cannot be decoded; names the file.
        """
        return decode_tensor(self.encoded(index), self.path(index), min_short_side)
