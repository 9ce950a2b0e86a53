"""Attention in windows: what a patch sees in most blocks of a backbone that looks at large images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.layers.packing import TokenLayout, pack, split_groups
from dinov2_equi.models.vision_transformer import DinoVisionTransformer


@dataclass(frozen=True)
class Windows:
    """In which blocks a patch sees its window alone.

    Attributes:
        side: of a window, patches.
        global_blocks: numbers of the blocks, counted from 0, in which every token sees all others.
    """

    side: int
    global_blocks: tuple[int, ...]


def attend_in_windows(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, *, grid: tuple[int, int], side: int, num_prefix: int
) -> Tensor:
    """Attend in windows; a function for `Attention`.

    Windows of `side` x `side` patches are laid from the upper left corner. Where the grid is no multiple of `side` the
    last ones of a row or column are smaller: nothing is filled up. The class token and the registers belong to all
    windows: they see all tokens, and every patch sees them and the patches of its window. It is global attention with a
    mask, and global attention itself where one window covers the grid.

    Args:
        query: [R, heads, head_dim], packed; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        layout: one group of images, each with `num_prefix` tokens and then the patches, row by row.
        grid: (h, w), patches of an image.
        side: of a window, patches.
        num_prefix: class token and registers.

    Source: Li et al. 2022 (ViTDet, arXiv 2203.16527), section 3, which has no class token and fills up the grid.
    """
    q, k, v = (split_groups(x, layout)[0].transpose(1, 2) for x in (query, key, value))  # [B, heads, T, head_dim]
    assert len(layout) == 1 and q.shape[2] == num_prefix + grid[0] * grid[1]
    prefix = F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v)  # [B, heads, prefix, head_dim]
    maps = [x[:, :, num_prefix:].unflatten(2, grid) for x in (q, k, v)]  # [B, heads, h, w, head_dim]
    prefixes = (k[:, :, :num_prefix], v[:, :, :num_prefix])
    stripes = []
    for rows in _stretches(grid[0], side):
        regions = [
            _attend_region([x[:, :, rows, columns] for x in maps], prefixes, min(side, rows.stop - rows.start), side)
            for columns in _stretches(grid[1], side)
        ]
        stripes.append(torch.cat(regions, dim=3))
    patches = torch.cat(stripes, dim=2).flatten(2, 3)  # [B, heads, N, head_dim]
    return torch.cat([prefix, patches], dim=2).transpose(1, 2).flatten(0, 1)  # [R, heads, head_dim]


def _stretches(length: int, side: int) -> list[slice]:
    """Return the part of an axis that whole windows cover, and the rest; those of the two that are not empty."""
    whole = length // side * side
    return [part for part in (slice(0, whole), slice(whole, length)) if part.stop > part.start]


def _attend_region(maps: Sequence[Tensor], prefixes: tuple[Tensor, Tensor], height: int, side: int) -> Tensor:
    """Attend in a region that windows of one size cover.

    Args:
        maps: query, key and value [B, heads, h, w, head_dim].
        prefixes: key and value of class token and registers [B, heads, prefix, head_dim].
        height: of a window.
        side: its width, if the region is as wide.

    Returns:
        [B, heads, h, w, head_dim].
    """
    batch, heads, rows, columns, _ = maps[0].shape
    width = min(side, columns)
    down, across = rows // height, columns // width
    q, k, v = (
        x.reshape(batch, heads, down, height, across, width, -1)
        .permute(0, 2, 4, 1, 3, 5, 6)
        .reshape(batch * down * across, heads, height * width, -1)
        for x in maps
    )  # [B * windows, heads, height * width, head_dim]
    seen_by_all = (x.repeat_interleave(down * across, dim=0) for x in prefixes)
    k, v = (torch.cat([first, x], dim=2) for first, x in zip(seen_by_all, (k, v), strict=True))
    out = F.scaled_dot_product_attention(q, k, v).view(batch, down, across, heads, height, width, -1)
    return out.permute(0, 3, 1, 4, 2, 5, 6).reshape(batch, heads, rows, columns, -1)


def windowed_tokens(
    backbone: DinoVisionTransformer, images: Tensor, blocks: Sequence[int], windows: Windows
) -> list[tuple[Tensor, Tensor]]:
    """Return patch tokens [B, N, D] and class token [B, D] after some blocks, through the final norm.

    Args:
        backbone: any of DINOv2's architecture.
        images: [B, 3, H, W], normalised; H and W are multiples of the patch size.
        blocks: numbers of the blocks, counted from 0.
        windows: which blocks attend in windows.
    """
    grid = backbone.patch_embed.grid_size(images.shape[-2], images.shape[-1])
    num_prefix = 1 + backbone.num_register_tokens
    attend = partial(attend_in_windows, grid=grid, side=windows.side, num_prefix=num_prefix)
    tokens, layout = pack([backbone.prepare_tokens_with_masks(images)])
    found: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.block_list()):
        tokens = block(tokens, layout, None if number in windows.global_blocks else attend)
        if number in blocks:
            (found[number],) = split_groups(backbone.norm(tokens), layout)  # [B, T, D]
    return [(found[number][:, num_prefix:], found[number][:, 0]) for number in blocks]
