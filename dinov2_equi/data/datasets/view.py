"""What views of a whole data set share that load its images otherwise."""

from __future__ import annotations

from typing import Generic, TypeVar

from dinov2_equi.data.datasets.base import ImageDataset, path_of
from dinov2_equi.data.datasets.blocks import Blocks, blocks_of

DatasetT = TypeVar("DatasetT", bound=ImageDataset)


class View(Generic[DatasetT]):
    """Length, names and classes of another data set, image for image.

    Args:
        dataset: The data set looked into.
    """

    def __init__(self, dataset: DatasetT) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return the name of image `index`."""
        return self.dataset.name(index)

    def path(self, index: int) -> str:
        """Return where image `index` is to be looked for."""
        return path_of(self.dataset, index)

    def blocks(self) -> Blocks | None:
        """Return the blocks of the data set."""
        return blocks_of(self.dataset)

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image."""
        return self.dataset.targets

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self.dataset.classes
