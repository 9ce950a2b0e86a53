"""Predictions of large images from windows that overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side: every `stride` pixels, the last one moved back to the edge.

    A side that is no longer than the window has one, which is as long as the side.
    """
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def sliding_window(
    predict: Callable[[Tensor], Tensor], images: Tensor, *, window: int, stride: int, batch_size: int = 8
) -> Tensor:
    """Return the mean of the predictions of all windows at each pixel: [B, C, H, W].

    Args:
        predict: returns [b, C, h, w] for parts [b, 3, h, w] of images.
        images: [B, 3, H, W].
        window: side of a part, pixels; a shorter side of the image is taken whole.
        stride: pixels from one part to the next, at most `window`.
        batch_size: parts in one call of `predict`, at least one image's.

    Raises:
        ValueError: a stride that leaves pixels out.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"expected 1 <= stride <= window, got a stride of {stride} and a window of {window}")
    B, _, H, W = images.shape
    height, width = min(window, H), min(window, W)
    corners = [(y, x) for y in window_starts(H, window, stride) for x in window_starts(W, window, stride)]
    total: Tensor | None = None
    counts = images.new_zeros(1, 1, H, W)
    per_call = max(batch_size // B, 1)
    for first in range(0, len(corners), per_call):
        chosen = corners[first : first + per_call]
        parts = torch.cat([images[..., y : y + height, x : x + width] for y, x in chosen])  # [n * B, 3, h, w]
        for (y, x), found in zip(chosen, predict(parts).split(B), strict=True):
            total = found.new_zeros(B, found.shape[1], H, W) if total is None else total
            total[..., y : y + height, x : x + width] += found
            counts[..., y : y + height, x : x + width] += 1
    assert total is not None
    return total / counts
