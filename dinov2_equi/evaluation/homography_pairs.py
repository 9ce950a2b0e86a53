"""Pairs of patches of one image that differ by a known homography, made on the fly: S-COCO.

Source: DeTone et al., "Deep image homography estimation", arXiv 1606.03798, section 3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.samplers import RandomStream, random_generator
from dinov2_equi.equi import geometry

TRAIN_STREAM, TEST_STREAM = RandomStream.AUGMENTATION, RandomStream.THETA


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Attributes:
        image_size: (H, W) to which every image is resized, whatever its shape, pixels.
        patch: side of the two patches, pixels.
        max_shift: each corner moves by up to so many pixels along each axis, uniformly (rho).
    """

    image_size: tuple[int, int] = (240, 320)
    patch: int = 128
    max_shift: int = 32

    @property
    def window(self) -> int:
        """Side of the part of the image around a patch that its corners can reach, pixels."""
        return self.patch + 2 * self.max_shift

    def check(self) -> None:
        """Refuse settings that make no homography.

        Raises:
            ValueError: names them.
        """
        if self.patch < 1 or not 0 < self.max_shift <= self.patch / 4:
            raise ValueError(
                "expected a largest shift from 1 pixel to a quarter of the patch, beyond which three corners can lie "
                f"on a line; got a shift of {self.max_shift} and a patch of {self.patch}"
            )
        if self.window > min(self.image_size):
            raise ValueError(
                f"a patch of {self.patch} whose corners move by {self.max_shift} needs images of at least "
                f"{self.window} pixels a side, got {self.image_size}"
            )


class Pair(NamedTuple):
    """One pair; of a batch each field has a leading axis B."""

    first: Tensor
    """[C, P, P] float32 in [0, 1], a patch of the image, P pixels a side."""

    second: Tensor
    """[C, P, P], what lies in the quadrilateral, drawn up to a square."""

    shifts: Tensor
    """[4, 2] float32 pixels (x, y): where the corners of the first patch have to go to make the quadrilateral. Top
    left, top right, bottom right, bottom left, as `geometry.corners`."""

    window: Tensor
    """[C, W, W], the image around the first patch, which lies in its middle."""


def make_pair(image: Tensor, settings: PairSettings, rng: np.random.Generator) -> Pair:
    """Return a pair from one image.

    A patch is cut out where its corners can move without leaving the image; each corner moves; H is the homography that
    takes the patch to the quadrilateral. A pixel p of the second patch shows the image at H p, so nothing has to be
    filled in.

    Args:
        image: [C, H, W] float32 in [0, 1] of `settings.image_size`.
        settings: sizes.
        rng: draws the place, then the shifts.
    """
    assert image.shape[1:] == settings.image_size
    top, left = (int(rng.integers(0, side - settings.window + 1)) for side in settings.image_size)
    shifts = torch.from_numpy(rng.uniform(-settings.max_shift, settings.max_shift, (4, 2)))
    window = image[:, top : top + settings.window, left : left + settings.window]
    size = (settings.patch, settings.patch)
    quad = geometry.corners(size).double() + shifts
    maps = geometry.inverse(geometry.homography(quad, size))  # content of the quadrilateral moves into the patch
    warped = geometry.warp(window[None], maps[None, None].float())[0, 0]
    inside = slice(settings.max_shift, settings.max_shift + settings.patch)
    return Pair(window[:, inside, inside], warped[:, inside, inside], shifts.float(), window)


class HomographyPairs(Dataset[Pair]):
    """Pairs by number; each depends on (images, settings, stream, seed, number) alone.

    Args:
        images: Of any size.
        settings: How pairs are made.
        length: Number of pairs; every pass over the images takes them in another order.
        stream: What the pairs are for, so that no two uses draw the same.
        seed: Of the draws.
    """

    def __init__(
        self,
        images: ImageDataset,
        settings: PairSettings,
        *,
        length: int,
        stream: RandomStream = TRAIN_STREAM,
        seed: int = 0,
    ) -> None:
        settings.check()
        self.images = images
        self.settings = settings
        self._length = length
        self._stream = stream
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self._length

    def __getitem__(self, index: int) -> Pair:
        """Return a pair.

        Raises:
            DatasetError: the image cannot be decoded; names the file.
        """
        epoch, place = divmod(index, len(self.images))
        order = _order(int(self._stream), self._seed, epoch, len(self.images))
        # The longer side, or an upright JPEG would be decoded smaller than it is needed.
        image = self.images.load_tensor(int(order[place]), max(self.settings.image_size))
        resized = tvf.resize(image, list(self.settings.image_size), InterpolationMode.BICUBIC, antialias=True)
        rng = random_generator(self._stream, self._seed, index)
        values = resized.clamp(0, 1) if resized.is_floating_point() else resized.float() / 255
        return make_pair(values, self.settings, rng)


@functools.lru_cache(maxsize=4)
def _order(stream: int, seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order of the images in one pass."""
    return np.random.default_rng([seed, stream, int(RandomStream.ORDER), epoch]).permutation(count)


def corner_errors(predicted: Tensor, shifts: Tensor) -> Tensor:
    """Return the mean corner error of each pair, pixels of the patch: [B] from shifts [B, 4, 2]."""
    errors: Tensor = (predicted - shifts).norm(dim=2).mean(dim=1)
    return errors
