"""Colour photographs that ship inside the scikit-image and scikit-learn packages: data without any download."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data.datasets.base import DatasetError, check_index, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb

DEFAULT_REGIONS = 2000

_REGION_SIDE_RANGE = (0.2, 1.0)  # of the photograph's shorter side
_REGION_STREAM = 0x5EED  # sets the regions' random numbers apart from every other use of small seeds
_MIN_LEVEL_SIDE = 64  # pixels: smaller versions of a photograph are not kept


@dataclass(frozen=True)
class _Photo:
    """Where a photograph lies, and its useful part: `box` is (top, left, bottom, right) as fractions."""

    package: str
    path: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def name(self) -> str:
        return Path(self.path).stem


_SKIMAGE, _SKLEARN = "skimage", "sklearn"
# The photographs held back (VAL) share no scene with the ones trained on.
_PHOTOS = {
    "TRAIN": (
        _Photo(_SKIMAGE, "data/astronaut.png"),
        _Photo(_SKLEARN, "datasets/images/china.jpg"),
        _Photo(_SKIMAGE, "data/hubble_deep_field.jpg"),
        _Photo(_SKIMAGE, "data/ihc.png"),
        _Photo(_SKIMAGE, "data/motorcycle_left.png"),
        _Photo(_SKIMAGE, "data/retina.jpg", box=(0.15, 0.15, 0.85, 0.85)),  # a disc in a black square: its inside
        _Photo(_SKIMAGE, "data/rocket.jpg"),
    ),
    "VAL": (
        _Photo(_SKIMAGE, "data/chelsea.png"),
        _Photo(_SKIMAGE, "data/coffee.png"),
        _Photo(_SKLEARN, "datasets/images/flower.jpg"),
    ),
}


class SamplePhotos:
    """Fixed, pseudo-random square regions of a handful of photographs; the class is the photograph.

    Image i is a region of photograph `i % number of photographs`, its side 0.2 to 1.0 of the shorter side. It depends
    on i and the split alone. Photographs are decoded once a process, at first use, and kept with versions of half,
    a quarter ... of their size, so that a small crop never starts from more pixels than it needs.

    Args:
        split: TRAIN or VAL (photographs that TRAIN does not hold).
        regions: Number of images.

    Raises:
        DatasetError: Unknown split, regions < 1, or a photograph is missing from the installed packages.
    """

    def __init__(self, split: str = "TRAIN", regions: int = DEFAULT_REGIONS) -> None:
        if split not in _PHOTOS:
            raise DatasetError(f"sample_photos has the splits {', '.join(_PHOTOS)}; got split={split!r}")
        if regions < 1:
            raise DatasetError(f"sample_photos needs regions >= 1; got regions={regions}")
        self.split = split
        self._length = regions
        self._photos = _PHOTOS[split]
        self._files = [_find_file(photo) for photo in self._photos]
        self._levels: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of regions."""
        return self._length

    def load(self, index: int) -> Image.Image:
        """Return region `index` as RGB at full resolution."""
        region = self.load_tensor(index)
        return Image.fromarray(region.permute(1, 2, 0).numpy())  # [3, H, W] -> [H, W, 3]

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return region `index` as uint8 [3, H, W], H = W up to rounding: a view of the cached photograph."""
        check_index(index, len(self), "sample_photos")
        levels = self._photo_levels(index % len(self._photos))
        rng = np.random.default_rng([_REGION_STREAM, index])
        side = rng.uniform(*_REGION_SIDE_RANGE) * min(levels[0].shape[1:])
        level = _coarsest_level(side, min_short_side, len(levels))
        _, height, width = levels[level].shape
        level_side = min(round(side / 2**level), height, width)
        top = round(rng.random() * (height - level_side))
        left = round(rng.random() * (width - level_side))
        return levels[level][:, top : top + level_side, left : left + level_side]

    def name(self, index: int) -> str:
        """Return photograph and region number, such as `astronaut/0`."""
        check_index(index, len(self), "sample_photos")
        region, photo = divmod(index, len(self._photos))
        return f"{self._photos[photo].name}/{region}"

    @property
    def targets(self) -> list[int]:
        """Number of the photograph that each region comes from."""
        return [index % len(self._photos) for index in range(len(self))]

    @property
    def classes(self) -> list[str]:
        """Names of the photographs."""
        return [photo.name for photo in self._photos]

    def _photo_levels(self, number: int) -> list[Tensor]:
        """Return a photograph at scales 1, 1/2, 1/4 ...: each uint8 [3, H, W]."""
        if number not in self._levels:
            photo = image_to_tensor(read_rgb(self._files[number]))
            _, height, width = photo.shape
            top, left, bottom, right = self._photos[number].box
            useful = photo[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
            self._levels[number] = _halvings(useful)
        return self._levels[number]


def _find_file(photo: _Photo) -> Path:
    """Return the path of a photograph, found without importing the package that holds it."""
    spec = importlib.util.find_spec(photo.package)
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photo.package]
    if spec is None or spec.origin is None:
        raise DatasetError(
            f"sample_photos takes the photograph {photo.name!r} from the package {distribution}, which is not "
            f"installed. Run `pip install {distribution}`, or give a folder of your own images."
        )
    file = Path(spec.origin).parent / photo.path
    if not file.is_file():
        raise DatasetError(
            f"sample_photos looked for {file} and did not find it: this build of {distribution} comes without its "
            f"pictures. Run `pip install --force-reinstall {distribution}`, or give a folder of your own images."
        )
    return file


def _halvings(photo: Tensor) -> list[Tensor]:
    """Return [photo, half size, quarter size, ...], uint8 [3, H, W] each, down to a short side of 64 pixels or more."""
    levels = [photo]
    while min(levels[-1].shape[1:]) >= 2 * _MIN_LEVEL_SIDE:
        _, height, width = levels[-1].shape
        half = [round(height / 2), round(width / 2)]
        levels.append(tvf.resize(levels[-1], half, InterpolationMode.BICUBIC, antialias=True))
    return levels


def _coarsest_level(side: float, min_short_side: int | None, num_levels: int) -> int:
    """Return the number of halvings after which a region of `side` pixels is still `min_short_side` long."""
    if min_short_side is None:
        return 0
    level = 0
    while level + 1 < num_levels and round(side / 2 ** (level + 1)) >= min_short_side:
        level += 1
    return level
