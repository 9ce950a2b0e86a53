"""Images that are not square, and a warp written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

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
