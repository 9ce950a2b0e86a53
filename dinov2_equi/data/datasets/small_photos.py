"""Two hundred small photographs that ship inside scikit-image: images to probe with, none of `sample_photos`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, check_index, image_to_tensor

SPLITS = ("TRAIN", "TEST")
_NUM_FACES = 100  # the first half of the file; the second shows backgrounds
_CYCLE, _TEST_SHARE = 10, 3  # the last three images of every ten are for testing: faces and backgrounds alike


class SmallPhotos:
    """Grey photographs of 25 x 25 pixels, half of them faces, half backgrounds; 140 to train on and 60 to test on.

    They are scikit-image's subset of Labeled Faces in the Wild. The ten photographs of `sample_photos` are too few for
    a probe to generalise from; these are few as well, but a head has an upright position.

    Args:
        split: TRAIN or TEST; no image is in both.

    Raises:
        DatasetError: Unknown split, or scikit-image comes without the file.
    """

    def __init__(self, split: str = "TRAIN") -> None:
        if split not in SPLITS:
            raise DatasetError(f"small_photos has the splits {', '.join(SPLITS)}; got split={split!r}")
        photos = _read_photos()  # [200, 25, 25] in [0, 1]
        is_test = np.arange(len(photos)) % _CYCLE >= _CYCLE - _TEST_SHARE
        self._numbers = np.flatnonzero(is_test == (split == "TEST"))
        self._pixels = np.rint(photos * 255).astype(np.uint8)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._numbers)

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB, 25 x 25 pixels."""
        check_index(index, len(self), "small_photos")
        return Image.fromarray(self._pixels[self._numbers[index]]).convert("RGB")

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, 25, 25]; always at full size."""
        del min_short_side
        return image_to_tensor(self.load(index))

    def name(self, index: int) -> str:
        """Return kind and number, such as `face/0`."""
        check_index(index, len(self), "small_photos")
        return f"{self.classes[self.targets[index]]}/{self._numbers[index]}"

    @property
    def targets(self) -> list[int]:
        """Kind of each image: 0 face, 1 background."""
        return [int(number >= _NUM_FACES) for number in self._numbers]

    @property
    def classes(self) -> list[str]:
        """Names of the kinds."""
        return ["face", "background"]


def _read_photos() -> np.ndarray:
    """Return the photographs as float [200, 25, 25] in [0, 1]; the package is found without being imported."""
    spec = importlib.util.find_spec("skimage")
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / "data" / "lfw_subset.npy"
    if file is None or not file.is_file():
        raise DatasetError(
            f"small_photos looked for {file or 'the package scikit-image'} and did not find it. "
            "Run `pip install --force-reinstall scikit-image`, or set evaluation.probe=false."
        )
    photos: np.ndarray = np.load(file, allow_pickle=False)
    return photos
