"""Split of token channels into an invariant part, for the SSL losses, and an equivariant part, for the decoder."""

from __future__ import annotations

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
