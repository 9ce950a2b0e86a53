"""The position embedding at any image size, in operations that can be recorded with the size left open.

`torch.nn.functional.interpolate` is recorded for one size, or as another interpolation where a format has no
antialiased bicubic one. Bicubic interpolation is linear and works on rows and columns one after the other, so two small
matrices do the same; they are made from the number of rows and columns alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_equi.models.vision_transformer import DinoVisionTransformer

# PyTorch's constants of the cubic convolution: Keys' -0.75, and -0.5 where it is antialiased.
_SHARPNESS, _SHARPNESS_ANTIALIASED = -0.75, -0.5


def positions_of_any_size(backbone: DinoVisionTransformer, height: int, width: int) -> Tensor:
    """Return what `backbone.interpolate_pos_encoding` does, [1, 1 + h*w, D], up to rounding.

    Height and width, in pixels, may be symbols of `torch.export`.
    """
    built_for = backbone.patch_embed.patches_resolution
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    counts = [torch.ones(new).sum() for new in grid]  # as tensors: no decision is taken while recording
    is_same = [count == old for count, old in zip(counts, built_for, strict=True)]
    if not backbone.interpolate_antialias:  # with it, PyTorch leaves an axis of the same length as it is
        is_same = [is_same[0] & is_same[1]] * 2
    rows, columns = (
        interpolation_matrix(
            new,
            old,
            scale=torch.where(same, 1.0, (count + backbone.interpolate_offset) / old),
            antialias=backbone.interpolate_antialias,
        )
        for new, old, count, same in zip(grid, built_for, counts, is_same, strict=True)
    )
    stored = backbone.pos_embed[0, 1:].float().reshape(*built_for, -1)  # [H, W, D]
    patches = torch.einsum("ih,hwd->iwd", rows, stored)  # [h, W, D]
    patches = torch.einsum("jw,iwd->ijd", columns, patches)  # [h, w, D]
    return torch.cat([backbone.pos_embed[:, :1].float(), patches.flatten(0, 1)[None]], dim=1).to(
        backbone.pos_embed.dtype
    )


def interpolation_matrix(new: int, old: int, *, scale: Tensor, antialias: bool) -> Tensor:
    """Return the weights [new, old] float32 of PyTorch's bicubic interpolation along one axis.

    Args:
        new: samples after it.
        old: samples before it.
        scale: of new to old, a scalar; it need not be their ratio.
        antialias: widen the kernel where the picture shrinks.
    """
    centres = (torch.arange(new)[:, None] + 0.5) / scale - 0.5  # [new, 1], in samples before
    places = torch.arange(old)[None]  # [1, old]
    if antialias:
        widening = torch.clamp(1 / scale, min=1.0)
        weights = _cubic((places - centres) / widening, _SHARPNESS_ANTIALIASED)
        return weights / weights.sum(dim=1, keepdim=True)  # what lies outside is left out
    first = torch.floor(centres) - 1
    weights = torch.zeros(())
    for tap in range(4):
        sample = first + tap  # [new, 1]
        # What lies outside counts for the sample at the border.
        weights = weights + _cubic(sample - centres, _SHARPNESS) * (sample.clamp(0, old - 1) == places)
    return weights


def _cubic(x: Tensor, a: float) -> Tensor:
    """Return the kernel of cubic convolution at distances x; 0 from 2 on."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros(())))
