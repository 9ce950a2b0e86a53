"""iNaturalist-2018, by its official annotation files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, check_index, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb

ADDRESS = "https://github.com/visipedia/inat_comp/tree/master/2018"
_FILES = {"TRAIN": "train2018.json", "VAL": "val2018.json"}


class INaturalist2018:
    """A split of iNaturalist-2018: `root/train2018.json` or `root/val2018.json`, and the images they name below root.

    The order is that of the file. Classes are those of its `categories`, by number; the two splits have the same.

    Args:
        root: The folder that holds the annotation files and `train_val2018/`.
        split: TRAIN or VAL.

    Raises:
        DatasetError: Unknown split, a file that is missing or holds something else, or no image where it should lie;
            says what was looked for and where to get it.
    """

    def __init__(self, root: Path | str, split: str = "TRAIN") -> None:
        if split not in _FILES:
            raise DatasetError(f"iNaturalist2018 has the splits {', '.join(_FILES)}; got split={split!r}")
        self.root = Path(root).expanduser()
        annotations = self.root / _FILES[split]
        if not annotations.is_file():
            raise DatasetError(
                f"iNaturalist2018, split {split}: looked for {annotations} and did not find it. Get annotations and "
                f"images from {ADDRESS} and set root to the folder that holds {', '.join(_FILES.values())} and "
                "train_val2018/<group>/<number>/*.jpg"
            )
        paths, self._targets, self._classes = _read(annotations)
        if not (self.root / paths[0]).is_file():
            raise DatasetError(
                f"{annotations} names {paths[0]}, which is not in {self.root}. Unpack train_val2018.tar.gz of "
                f"{ADDRESS} there"
            )
        # One array instead of a list of strings: workers share it, since reading it touches no reference count.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def load(self, index: int) -> Image.Image:
        """Return image `index` as upright RGB.

        Raises:
            UnreadableImageError: The file cannot be decoded; names the file.
        """
        return read_rgb(self.root / self.name(index))

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W]; large JPEGs are decoded at a fraction of their size.

        Raises:
            UnreadableImageError: The file cannot be decoded; names the file.
        """
        return image_to_tensor(read_rgb(self.root / self.name(index), min_short_side))

    def name(self, index: int) -> str:
        """Return the path of image `index` below the root."""
        check_index(index, len(self), str(self.root))
        return os.fsdecode(bytes(self._paths[index]))

    @property
    def targets(self) -> list[int]:
        """Class number of each image."""
        return self._targets

    @property
    def classes(self) -> list[str]:
        """Class names; their numbers in the file where two have one name."""
        return self._classes


def _read(path: Path) -> tuple[list[str], list[int], list[str]]:
    """Return file names, class numbers and class names."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        labels = {note["image_id"]: note["category_id"] for note in content["annotations"]}
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        number = {category["id"]: index for index, category in enumerate(categories)}
        targets = [number[labels[image]] for image in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} is no annotation file of iNaturalist-2018 ({type(error).__name__}: {error}); expected images (id, "
            f"file_name), annotations (image_id, category_id) and categories (id, name), as from {ADDRESS}"
        ) from error
    if not files:
        raise DatasetError(f"{path} names no image; get it again from {ADDRESS}")
    names = [str(category.get("name", category["id"])) for category in categories]
    if len(set(names)) < len(names):
        names = [str(category["id"]) for category in categories]
    return list(files.values()), targets, names
