"""Predictions from windows that overlap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_equi.evaluation.dense.sliding import sliding_window, window_starts


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 3, [0]), (3, 4, 1, [0]), (9, 3, 3, [0, 3, 6])],
)
def test_starts_of_windows(length: int, window: int, stride: int, starts: list[int]) -> None:
    assert window_starts(length, window, stride) == starts


def predict(parts: Tensor) -> Tensor:
    """Depends on what else is in the window, as a transformer does."""
    return torch.cat([parts, parts.mean(dim=(1, 2, 3), keepdim=True).expand(-1, 1, *parts.shape[-2:])], dim=1)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("size", [(11, 17), (5, 9), (3, 4)])
def test_mean_over_windows_differs_from_a_plain_loop(size: tuple[int, int], batch_size: int) -> None:
    H, W = size
    images = torch.rand(2, 3, H, W)
    total, count = torch.zeros(2, 4, H, W), torch.zeros(H, W)
    for y in window_starts(H, 5, 3):
        for x in window_starts(W, 5, 3):
            total[..., y : y + 5, x : x + 5] += predict(images[..., y : y + 5, x : x + 5])
            count[y : y + 5, x : x + 5] += 1
    assert count.min() >= 1
    found = sliding_window(predict, images, window=5, stride=3, batch_size=batch_size)
    assert torch.allclose(found, total / count, atol=1e-6)  # float32, a few sums


def test_one_window_differs_from_the_whole_image() -> None:
    images = torch.rand(1, 3, 6, 9)
    assert torch.equal(sliding_window(predict, images, window=9, stride=9), predict(images))


def test_stride_that_leaves_pixels_out_is_taken() -> None:
    with pytest.raises(ValueError, match="a stride of 6 and a window of 5"):
        sliding_window(predict, torch.rand(1, 3, 9, 9), window=5, stride=6)
