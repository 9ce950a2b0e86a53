"""Images that are not square, a warp written as plain loops, and an image known between its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_equi.equi import geometry

SlowWarp = Callable[[Tensor, Tensor, str], Tensor]


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """Return a function that makes images [*shape] of independent values in [0, 1)."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

    return make


def _reflected(index: float, size: int) -> float:
    """Return a pixel index mirrored at the image edges -0.5 and size - 0.5, then held inside the outer centres."""
    place = (index + 0.5) % (2 * size)
    place = 2 * size - place if place >= size else place
    return min(max(place - 0.5, 0.0), size - 1.0)


def _bilinear(image: np.ndarray, row: float, column: float) -> np.ndarray:
    """Return the channels [C] of an image [C, H, W] between its pixels; 0 beyond the outer centres."""
    _, H, W = image.shape
    top, left = math.floor(row), math.floor(column)
    value = np.zeros(image.shape[0])
    for r in (top, top + 1):
        for c in (left, left + 1):
            if 0 <= r < H and 0 <= c < W:
                value += image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


@pytest.fixture(scope="session")
def slow_warp() -> SlowWarp:
    """Return the oracle of `geometry.warp` for one image [C, H, W] and one forward map [3, 3], in float64."""

    def warp(image: Tensor, forward: Tensor, fill: str) -> Tensor:
        source = image.double().numpy()
        C, H, W = source.shape
        backward = np.linalg.inv(forward.double().numpy())
        result = np.zeros((C, H, W))
        for row in range(H):
            for column in range(W):
                x, y, w = backward @ np.array([column - (W - 1) / 2, row - (H - 1) / 2, 1.0])
                source_column, source_row = x / w + (W - 1) / 2, y / w + (H - 1) / 2
                if fill == "reflect":
                    source_column, source_row = _reflected(source_column, W), _reflected(source_row, H)
                result[:, row, column] = _bilinear(source, source_row, source_column)
        return torch.from_numpy(result)

    return warp


@dataclass(frozen=True)
class Wave:
    """Sine waves sampled as an image: bilinear interpolation of them errs by a known amount."""

    size: tuple[int, int] = (40, 56)
    periods: tuple[float, float] = (16.0, 20.0)  # pixels, along x and y
    amplitude: float = 0.25

    @property
    def warp_error(self) -> float:
        """The most that one bilinear resampling may err: h^2 / 8 times the second derivatives, h = 1 pixel."""
        return self.amplitude * sum((2 * math.pi / period) ** 2 for period in self.periods) / 8  # 0.0079

    @property
    def image(self) -> Tensor:
        """The image [1, 3, H, W]; the channels are alike."""
        return self.at(geometry.pixel_centres(self.size)).view(1, 1, *self.size).expand(1, 3, *self.size).float()

    def at(self, points: Tensor) -> Tensor:
        """The values [...] at points [..., 2], float64."""
        x, y = points.double().unbind(-1)
        period_x, period_y = self.periods
        waves = torch.sin(2 * math.pi * x / period_x) + torch.cos(2 * math.pi * y / period_y)
        return 0.5 + self.amplitude * waves

    def disc(self, radius: float) -> Tensor:
        """The mask [H, W] of the pixels that lie at most `radius` from the centre: no rotation takes them out."""
        distances = torch.linalg.vector_norm(geometry.pixel_centres(self.size), dim=-1)  # [H * W]
        return torch.less(distances, radius).view(self.size)


@pytest.fixture(scope="session")
def wave() -> Wave:
    """Return the waves."""
    return Wave()
