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


def scaling(factor: Tensor) -> Tensor:
    """Return the maps that magnify by `factor` [...] > 0 about the centre -> [..., 3, 3]."""
    zero, one = torch.zeros_like(factor), torch.ones_like(factor)
    return _matrices(factor, zero, zero, zero, factor, zero, zero, zero, one)


def corners(size: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """Return the corners [4, 2] of an (H, W) image: top left, top right, bottom right, bottom left."""
    H, W = size
    signs = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], device=device)
    return signs * torch.tensor([W / 2, H / 2], device=device)


def homography(quad: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the maps [..., 3, 3] that move the corners of an (H, W) image, in the order of `corners`, to `quad`.

    Args:
        quad: [..., 4, 2] points; convex, no three on a line, or the map is not invertible.
        size: (H, W).

    Source: Heckbert, "Fundamentals of texture mapping and image warping", 1989, section 2.2.3.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (point.unbind(dim=-1) for point in quad.unbind(dim=-2))
    right_x, right_y, down_x, down_y = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3  # 0 for a parallelogram: the map is affine
    area = right_x * down_y - down_x * right_y
    g = (sum_x * down_y - down_x * sum_y) / area
    h = (right_x * sum_y - sum_x * right_y) / area
    from_square = _matrices(
        x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, torch.ones_like(g)
    )  # [0, 1] x [0, 1] -> quad
    H, W = size
    to_square = quad.new_tensor([[1 / W, 0.0, 0.5], [0.0, 1 / H, 0.5], [0.0, 0.0, 1.0]])
    return compose(from_square, to_square)


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
    x, y = _pixel_axes(size, device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # [H * W, 2]


def _pixel_axes(size: tuple[int, int], device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return the x [W] of the columns and the y [H] of the rows of an (H, W) image."""
    H, W = size
    x = torch.arange(W, device=device, dtype=torch.float32) - (W - 1) / 2
    y = torch.arange(H, device=device, dtype=torch.float32) - (H - 1) / 2
    return x, y


def _sampling_grid(backward: Tensor, size: tuple[int, int]) -> Tensor:
    """Return where the pixels of an (H, W) image come from: maps [S, B, 3, 3] -> [B, S, H, W, 2] for `grid_sample`.

    `grid_sample` wants (x, y) in [-1, 1] from edge to edge. Before its division a map is a term for each column plus a
    term for each row; with a point as the complex number x + iy, one addition makes both coordinates side by side. That
    is many times as fast on a CPU as `transform_points`, and the warp hardly slower than its look-ups.
    """
    H, W = size
    x, y = _pixel_axes(size, backward.device)
    half = backward.new_tensor([W / 2, H / 2, 1.0])[:, None]
    of_x, of_y, offset = backward.transpose(0, 1).split(1, dim=-1)  # [B, S, 3, 1]
    columns = of_x * x / half  # [B, S, 3, W]
    rows = (of_y * y + offset) / half  # [B, S, 3, H]
    columns, rows = columns.unsqueeze(-2), rows.unsqueeze(-1)  # [B, S, 3, 1, W], [B, S, 3, H, 1]
    points = torch.complex(columns[:, :, 0], columns[:, :, 1]) + torch.complex(rows[:, :, 0], rows[:, :, 1])
    grid = torch.view_as_real(points)  # [B, S, H, W, 2]
    if not _are_known_to_be_affine(backward):
        scale = (columns[:, :, 2] + rows[:, :, 2]).reciprocal_()  # [B, S, H, W]
        grid[..., 0].mul_(scale)
        grid[..., 1].mul_(scale)
    return grid


def _are_known_to_be_affine(maps: Tensor) -> bool:
    """Return whether no map [..., 3, 3] needs a division; False on a device, which would have to be waited for."""
    return maps.device.type == "cpu" and bool((maps[..., 2, :] == maps.new_tensor([0.0, 0.0, 1.0])).all())


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
    grid = _sampling_grid(inverse(maps.float()), (H, W)).flatten(1, 2)  # [B, S * H, W, 2]
    warped = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode=_PADDING_MODES[fill], align_corners=False
    )  # [B, C, S * H, W]
    return warped.reshape(B, C, S, H, W).permute(2, 0, 1, 3, 4)  # [S, B, C, H, W]
