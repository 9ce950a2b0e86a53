"""Packed token sequences: crops of several sizes as rows of one matrix.

A packed tensor has shape [R, D]. Its rows are the tokens of all images, image after image, crop size after crop size;
a `TokenLayout` says where each image starts. Everything that works token by token (linear layers, norms) then runs
once for all crop sizes, and attention alone needs the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

TokenLayout: TypeAlias = tuple[tuple[int, int], ...]
"""One `(images, tokens per image)` pair for each crop size."""


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, TokenLayout]:
    """Pack groups of equally long sequences into one matrix.

    Args:
        groups: tensors [B_i, T_i, D], one for each crop size.

    Returns:
        The tokens [sum_i B_i*T_i, D] and their layout.
    """
    layout = tuple((group.shape[0], group.shape[1]) for group in groups)
    rows = [group.flatten(0, 1) for group in groups]  # each [B_i*T_i, D]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), layout


def split_groups(rows: Tensor, layout: TokenLayout) -> list[Tensor]:
    """Undo `pack` without a copy: rows [R, ...] to one tensor [B_i, T_i, ...] for each crop size."""
    groups = []
    start = 0
    for images, tokens in layout:
        stop = start + images * tokens
        groups.append(rows[start:stop].view(images, tokens, *rows.shape[1:]))  # [B_i, T_i, ...]
        start = stop
    return groups
