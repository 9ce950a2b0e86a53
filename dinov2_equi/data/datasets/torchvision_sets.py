"""Labelled data sets that torchvision reads, by their names there. Nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError, check_index, image_to_tensor
from dinov2_equi.data.datasets.decode import to_rgb

SPLITS = ("train", "val")


@dataclass(frozen=True)
class _Set:
    """How torchvision calls the two splits, and where it expects the files below the root."""

    train: Mapping[str, Any]
    val: Mapping[str, Any]
    place: str


_SETS: dict[str, _Set] = {
    "CIFAR10": _Set({"train": True}, {"train": False}, "cifar-10-batches-py"),
    "CIFAR100": _Set({"train": True}, {"train": False}, "cifar-100-python"),
    "DTD": _Set({"split": "train"}, {"split": "test"}, "dtd/dtd"),
    "FGVCAircraft": _Set({"split": "trainval"}, {"split": "test"}, "fgvc-aircraft-2013b"),
    "Flowers102": _Set({"split": "train"}, {"split": "test"}, "flowers-102"),
    "Food101": _Set({"split": "train"}, {"split": "test"}, "food-101"),
    "OxfordIIITPet": _Set({"split": "trainval"}, {"split": "test"}, "oxford-iiit-pet"),
    "STL10": _Set({"split": "train"}, {"split": "test"}, "stl10_binary"),
    "SVHN": _Set({"split": "train"}, {"split": "test"}, "train_32x32.mat and test_32x32.mat"),
}


class TorchvisionSet:
    """A data set of torchvision: RGB images and class numbers, in its own order.

    `train` is what models are customarily trained on (train and validation images together for aircraft and pets),
    `val` the test images.

    Args:
        name: As in torchvision.datasets, such as CIFAR10.
        root: The folder that its `root` argument means.
        split: "train" or "val".

    Raises:
        DatasetError: Unknown name or split, or the files are not there; says where they must lie and how to get them.
    """

    def __init__(self, name: str, root: Path | str, split: str = "train") -> None:
        if name not in _SETS:
            nearest = difflib.get_close_matches(name, _SETS, n=1, cutoff=0.0)[0]
            raise DatasetError(f"no such data set {name!r}; did you mean {nearest!r}? Known: {', '.join(_SETS)}")
        if split not in SPLITS:
            raise DatasetError(f"split must be {' or '.join(SPLITS)}; got {split!r}")
        self._name = f"{name}/{split}"
        self._data = _open(name, Path(root).expanduser(), split)
        self._targets = _labels(self._data)
        self._classes = [str(word) for word in getattr(self._data, "classes", range(max(self._targets) + 1))]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._targets)

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB.

        Raises:
            UnreadableImageError: The image cannot be decoded; names it.
        """
        check_index(index, len(self), self._name)
        try:
            image, _ = self._data[index]
            return to_rgb(image)
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{self.name(index)} cannot be decoded: {error}") from error

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W], at full resolution."""
        return image_to_tensor(self.load(index))

    def name(self, index: int) -> str:
        """Return the data set, the split and the number of an image."""
        check_index(index, len(self), self._name)
        return f"{self._name}/{index}"

    @property
    def targets(self) -> list[int]:
        """Class number of each image."""
        return self._targets

    @property
    def classes(self) -> list[str]:
        """Class names, or their numbers where torchvision has no names."""
        return self._classes


def _open(name: str, root: Path, split: str) -> Any:
    facts = _SETS[name]
    make: Callable[..., Any] = getattr(importlib.import_module("torchvision.datasets"), name)
    try:
        return make(str(root), download=False, **(facts.train if split == "train" else facts.val))
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"{name} is not in {root}, or not whole: torchvision expects {root / facts.place} and says: "
            f"{str(error).splitlines()[0]} Get it with torchvision.datasets.{name}({str(root)!r}, download=True)"
        ) from error


def _labels(data: Any) -> list[int]:
    """Return the class number of each image without decoding any."""
    for attribute in ("targets", "labels", "_labels"):  # torchvision has no common name for them
        labels = getattr(data, attribute, None)
        if labels is not None:
            return [int(label) for label in labels]
    raise DatasetError(f"this version of torchvision hides the labels of {type(data).__name__}")
