"""Mean and standard deviation of each channel over a whole data set, one image at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the pixels of some images, in [0, 1]."""

    num_images: int
    num_pixels: int
    mean: Numbers
    """[C]."""
    squares: Numbers
    """[C], sum of the squared distances from the mean."""
    bad: tuple[str, ...] = ()
    """Messages about images that cannot be read."""

    @property
    def std(self) -> Numbers:
        """Standard deviation of the pixels of each channel, [C]."""
        return np.sqrt(self.squares / max(self.num_pixels, 1))

    def joined(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return what is known of both.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979: exact where sums of squares would lose the digits that count.
        """
        total = self.num_pixels + other.num_pixels
        if self.num_pixels == 0 or other.num_pixels == 0:
            one = self if self.num_pixels else other
            mean, squares = one.mean, one.squares
        else:
            distance = other.mean - self.mean
            mean = self.mean + distance * (other.num_pixels / total)
            squares = self.squares + other.squares + distance**2 * (self.num_pixels * other.num_pixels / total)
        return ChannelStatistics(self.num_images + other.num_images, total, mean, squares, self.bad + other.bad)


def statistics_of(image: Tensor) -> ChannelStatistics:
    """Return the statistics of one image, uint8 [3, H, W] or float [C, H, W] in [0, 1], in float64."""
    pixels = image.double() if image.is_floating_point() else image.double() / 255
    variance, mean = torch.var_mean(pixels, dim=(1, 2), correction=0)
    count = image.shape[1] * image.shape[2]
    return ChannelStatistics(1, count, mean.numpy(), variance.numpy() * count)


def channel_statistics(
    dataset: ImageDataset, indices: Sequence[int], *, num_workers: int = 0
) -> Iterable[ChannelStatistics]:
    """Yield the statistics of the images so far, after each image; every pixel counts the same.

    Args:
        dataset: Where the images come from.
        indices: Which of them; those that cannot be read are passed over and noted.
        num_workers: Processes that read; 0: this one.

    Raises:
        DatasetError: The images have different numbers of channels.
    """
    parts = DataLoader(_Parts(dataset, indices), batch_size=None, num_workers=num_workers)
    so_far: ChannelStatistics | None = None
    for part in parts:
        if so_far is not None and so_far.num_pixels and part.num_pixels and len(part.mean) != len(so_far.mean):
            raise DatasetError(f"images of {len(so_far.mean)} and of {len(part.mean)} channels; expected one number")
        so_far = part if so_far is None else so_far.joined(part)
        yield so_far


class _Parts(Dataset[ChannelStatistics]):
    """The statistics of each image by itself."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> ChannelStatistics:
        try:
            return statistics_of(self._dataset.load_tensor(self._indices[number]))
        except UnreadableImageError as error:
            return ChannelStatistics(0, 0, np.zeros(0), np.zeros(0), (str(error),))
