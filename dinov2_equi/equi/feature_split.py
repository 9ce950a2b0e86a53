"""Split of token channels into an invariant part, for the SSL losses, and an equivariant part, for the decoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureSplit(nn.Module):
    """Channels `[..., D]` -> invariant `[..., D_inv]` first, equivariant `[..., D_equi]` last.

    With `projection_dim` a linear layer maps D to that width before the split; without it the channels themselves are
    divided, and the module has no parameter. Each half is computed on its own, so that tokens of which only one half
    is needed cost only that half.

    Source: Wang et al. (AAAI-26), section 3.1: `d_patch = d_inv + d_equi`.
    """

    def __init__(self, in_dim: int, equi_dim: int, projection_dim: int | None = None) -> None:
        """Build the split.

        Args:
            in_dim: D, width of the tokens.
            equi_dim: D_equi, width of the equivariant part.
            projection_dim: width that is divided; None divides the D channels themselves.

        Raises:
            ValueError: if `equi_dim` leaves no channel for one of the parts.
        """
        super().__init__()
        width = in_dim if projection_dim is None else projection_dim
        if not 0 < equi_dim < width:
            raise ValueError(f"the equivariant width must lie between 1 and {width - 1}, got {equi_dim}")
        self.invariant_dim = width - equi_dim
        self.equi_dim = equi_dim
        self.projection = None if projection_dim is None else nn.Linear(in_dim, projection_dim)

    def invariant(self, tokens: Tensor) -> Tensor:
        """Return the invariant part [..., D_inv] of tokens [..., D]."""
        if self.projection is None:
            return tokens[..., : self.invariant_dim]
        weight, bias = self.projection.weight, self.projection.bias
        return F.linear(tokens, weight[: self.invariant_dim], bias[: self.invariant_dim])

    def equivariant(self, tokens: Tensor) -> Tensor:
        """Return the equivariant part [..., D_equi] of tokens [..., D]."""
        if self.projection is None:
            return tokens[..., self.invariant_dim :]
        weight, bias = self.projection.weight, self.projection.bias
        return F.linear(tokens, weight[self.invariant_dim :], bias[self.invariant_dim :])


RECORDED_DIM, RECORDED_BLOCK = "equi_dim", "block"
"""What stands beside the weights of a split in a teacher checkpoint: its width, the block whose tokens it divides."""

_LAST_BLOCK = -1


def split_record(split: FeatureSplit, block: int | None) -> dict[str, Tensor]:
    """Return what a file must hold to build a split again: its weights, and what weights do not tell.

    Args:
        split: the split.
        block: the block whose tokens hold the equivariant part, counted from 0; None for the last.
    """
    facts = {RECORDED_DIM: split.equi_dim, RECORDED_BLOCK: _LAST_BLOCK if block is None else block}
    return split.state_dict() | {name: torch.tensor(value) for name, value in facts.items()}


def split_from_record(record: Mapping[str, Tensor], in_dim: int) -> tuple[FeatureSplit, int | None]:
    """Return the split and the block of a record that `split_record` made.

    Args:
        record: names to tensors.
        in_dim: D, width of the tokens.

    Raises:
        ValueError: if the record lacks the width, as those of earlier versions do, or does not fit `in_dim`.
    """
    if RECORDED_DIM not in record:
        raise ValueError(f"the split has no {RECORDED_DIM}: the file is of an earlier version; export the run again")
    projection = record.get("projection.weight")
    split = FeatureSplit(in_dim, int(record[RECORDED_DIM]), None if projection is None else projection.shape[0])
    split.load_state_dict({name: t for name, t in record.items() if name not in (RECORDED_DIM, RECORDED_BLOCK)})
    block = int(record.get(RECORDED_BLOCK, _LAST_BLOCK))
    return split, None if block == _LAST_BLOCK else block
