"""Planar maps and the one resampling step that applies them to images.

Conventions, stated once for the whole project:

* A point is `(x, y)` in pixels, x to the right, y **down**, with the origin at the image centre. Working in pixels and
  not in [-1, 1] keeps a rotation a rotation on an image that is not square.
* A map is a `[..., 3, 3]` homogeneous matrix that moves points *forward*: content at `p` is found at `M p` afterwards.
* `compose(a, b)` applies `b` first.
* Angles are degrees, counter-clockwise as seen on the screen.
* Image sizes are `(H, W)`. Pixel centres follow `align_corners=False`: the image spans [-W/2, W/2] x [-H/2, H/2].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fill = Literal["reflect", "zeros"]

_PADDING_MODES = {"reflect": "reflection", "zeros": "zeros"}
FILLS: tuple[str, ...] = tuple(_PADDING_MODES)


def rotation(angle_deg: Tensor) -> Tensor:
    """Return the maps that rotate about the centre: [...] degrees, counter-clockwise on screen -> [..., 3, 3]."""
    angle = torch.deg2rad(angle_deg)
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    # y points down, so counter-clockwise on screen has the sine above the diagonal.
    return _matrices(cos, sin, zero, -sin, cos, zero, zero, zero, one)


def translation(offset: Tensor) -> Tensor:
    """Return the maps that shift by `offset` [..., 2] = (x, y) pixels -> [..., 3, 3]."""
    x, y = offset.unbind(dim=-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices(one, zero, x, zero, one, y, zero, zero, one)


def _matrices(*entries: Tensor) -> Tensor:
    """Return matrices [..., 3, 3] from nine entries [...], row by row."""
    stacked = torch.stack(entries, dim=-1)  # [..., 9]
    return stacked.reshape(*stacked.shape[:-1], 3, 3)


def compose(a: Tensor, b: Tensor) -> Tensor:
    """Return the map that applies `b` first, then `a`; both [..., 3, 3].

    Written without a matrix product: autocast and TF32 would round its factors, and a point 100 pixels from the centre
    would be known to half a pixel only.
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(dim=-2)  # [..., 3, 3, 3] -> [..., 3, 3]


def inverse(maps: Tensor) -> Tensor:
    """Return the maps that undo `maps` [..., 3, 3]."""
    inverted: Tensor = torch.linalg.inv(maps)
    return inverted


def transform_points(maps: Tensor, points: Tensor) -> Tensor:
    """Return `points` [..., K, 2] moved forward by `maps` [..., 3, 3]; leading axes broadcast."""
    x, y = points.unbind(dim=-1)  # [..., K]
    m = maps.unsqueeze(-3)  # [..., 1, 3, 3]; products entry by entry, for the reason given in `compose`
    moved_x, moved_y, w = (m[..., i, 0] * x + m[..., i, 1] * y + m[..., i, 2] for i in range(3))  # [..., K]
    return torch.stack([moved_x / w, moved_y / w], dim=-1)


def pixel_centres(size: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """Return the centres of all pixels of an (H, W) image as points [H * W, 2], row by row."""
    H, W = size
    x = torch.arange(W, device=device, dtype=torch.float32) - (W - 1) / 2
    y = torch.arange(H, device=device, dtype=torch.float32) - (H - 1) / 2
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # [H * W, 2]


def warp(images: Tensor, maps: Tensor, fill: str = "reflect") -> Tensor:
    """Move the content of images forward by planar maps, with one bilinear resampling of each source image.

    All S results of an image come from the same source in a single `grid_sample` call: the S sampling grids are laid
    below each other, so the source is neither copied nor resampled twice.

    Args:
        images: [B, C, H, W] float; computed in float32.
        maps: [S, B, 3, 3] forward maps, see the module's conventions.
        fill: what lies outside the image, one of `FILLS`.

    Returns:
        [S, B, C, H, W] float32.

    Raises:
        ValueError: if `fill` is unknown or the batch sizes differ.
    """
    B, C, H, W = images.shape
    S = maps.shape[0]
    if fill not in _PADDING_MODES:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}; got {fill!r}")
    if maps.shape != (S, B, 3, 3):
        raise ValueError(f"expected maps of shape [S, {B}, 3, 3] for {B} images, got {list(maps.shape)}")
    output_points = pixel_centres((H, W), device=images.device)  # [H * W, 2]
    source_points = transform_points(inverse(maps.float()), output_points)  # [S, B, H * W, 2]
    grid = source_points / source_points.new_tensor((W / 2, H / 2))  # grid_sample wants [-1, 1] from edge to edge
    grid = grid.transpose(0, 1).reshape(B, S * H, W, 2)
    warped = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode=_PADDING_MODES[fill], align_corners=False
    )  # [B, C, S * H, W]
    return warped.reshape(B, C, S, H, W).permute(2, 0, 1, 3, 4)  # [S, B, C, H, W]
