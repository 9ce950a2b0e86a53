"""Drawn images for tests and dry runs: no file is read."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, check_index, image_to_tensor

_SHAPES = ("disc", "rectangle", "triangle")
_SHAPES_PER_IMAGE = 4


class SyntheticImages:
    """Coloured shapes of one kind over a colour gradient; the class of image i is its kind of shape, `i % 3`.

    Args:
        length: Number of images.
        size: (H, W) in pixels.
        seed: Images depend on (seed, index) alone.

    Raises:
        DatasetError: length or a side is below 1.
    """

    def __init__(self, length: int = 64, size: tuple[int, int] = (96, 128), seed: int = 0) -> None:
        if length < 1 or min(size) < 1:
            raise DatasetError(f"synthetic needs length >= 1 and sides >= 1; got length={length}, size={size}")
        if seed < 0:
            raise DatasetError(f"synthetic needs seed >= 0; got seed={seed}")
        self.size = size
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of images."""
        return self._length

    def load(self, index: int) -> Image.Image:
        """Return image `index`, mode RGB, `size` pixels."""
        check_index(index, len(self), "synthetic")
        rng = np.random.default_rng([self._seed, index])
        image = Image.fromarray(_gradient(self.size, rng))
        draw = ImageDraw.Draw(image)
        for _ in range(_SHAPES_PER_IMAGE):
            _draw_shape(draw, _SHAPES[index % len(_SHAPES)], self.size, rng)
        return image

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W]; always at full size."""
        del min_short_side
        return image_to_tensor(self.load(index))

    def name(self, index: int) -> str:
        """Return kind of shape and number, such as `disc/0`."""
        check_index(index, len(self), "synthetic")
        return f"{_SHAPES[index % len(_SHAPES)]}/{index}"

    @property
    def targets(self) -> list[int]:
        """Kind of shape of each image, an index into `classes`."""
        return [index % len(_SHAPES) for index in range(len(self))]

    @property
    def classes(self) -> list[str]:
        """The kinds of shapes."""
        return list(_SHAPES)


def _gradient(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return uint8 [H, W, 3]: four random corner colours, blended linearly."""
    height, width = size
    corners = rng.uniform(0, 255, (2, 2, 3))
    down = np.linspace(0, 1, height)[:, None, None]
    across = np.linspace(0, 1, width)[None, :, None]
    upper = corners[0, 0] * (1 - across) + corners[0, 1] * across
    lower = corners[1, 0] * (1 - across) + corners[1, 1] * across
    return np.asarray(upper * (1 - down) + lower * down).astype(np.uint8)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Draw one shape of random place, extent and colour."""
    height, width = size
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    half_width, half_height = rng.uniform(0.08, 0.3, 2) * min(size)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    color = tuple(int(value) for value in rng.integers(0, 256, 3))
    if shape == "disc":
        draw.ellipse(box, fill=color)
    elif shape == "rectangle":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=color)
