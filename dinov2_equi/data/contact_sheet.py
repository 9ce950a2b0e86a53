"""Images and their crops side by side, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.augmentations import Crops
from dinov2_equi.data.datasets.channels import channels_as_rgb

TILE_PX = 160
_GAP_PX = 4
_WHITE = 1.0


def contact_sheet(sources: Sequence[Tensor], crops: Sequence[Crops], tile: int = TILE_PX) -> Tensor:
    """Return a sheet as uint8 [H, W, 3]: a row an image, first the image itself, then its global and local crops.

    Every picture is enlarged or shrunk to fit a tile; its shape stays as it is.

    Args:
        sources: Images, uint8 [3, H, W], or float32 [C, H, W] in [0, 1], at least one.
        crops: What was cropped from each.
        tile: Side of a tile, pixels.
    """
    rows = []
    for source, parts in zip(sources, crops, strict=True):
        image = source if source.is_floating_point() else source / 255
        pictures = [image, *parts.global_crops, *parts.local_crops]
        rows.append(torch.cat([_tile(channels_as_rgb(picture), tile) for picture in pictures], dim=2))
    sheet = torch.cat(rows, dim=1)  # [3, rows * (tile + gap), columns * (tile + gap)]
    return (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _tile(picture: Tensor, side: int) -> Tensor:
    """Return a picture [3, H, W] in the middle of a white square with a gap around it: [3, side + gap, side + gap]."""
    height, width = picture.shape[-2:]
    scale = side / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    shrunk = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    square = torch.full((3, side + _GAP_PX, side + _GAP_PX), _WHITE)
    top, left = (side + _GAP_PX - size[0]) // 2, (side + _GAP_PX - size[1]) // 2
    square[:, top : top + size[0], left : left + size[1]] = shrunk
    return square
