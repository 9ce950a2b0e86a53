"""Expander: the head of VICReg."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from dinov2_equi.layers.batch_norm import BatchNorm1d


class Expander(nn.Sequential):
    """Linear layers with batch norm and ReLU between them, [B, in_dim] to [B, dim], B >= 2; the last is linear alone.

    The batch norm keeps no running statistics: the head is used in training only.
    Source: "VICReg", Bardes et al. 2022, section 4.2.
    """

    def __init__(self, in_dim: int, dim: int = 2048, num_layers: int = 3) -> None:
        """Build the head.

        Args:
            in_dim: width of the features.
            dim: hidden and output width.
            num_layers: linear layers, at least 1.

        Raises:
            ValueError: if `num_layers` is below 1.
        """
        if num_layers < 1:
            raise ValueError(f"expected num_layers >= 1, got {num_layers}")
        *hidden, last = pairwise([in_dim, *[dim] * num_layers])
        layers: list[nn.Module] = []
        for width_in, width_out in hidden:
            # The batch norm takes the mean away, and any bias with it.
            layers += [nn.Linear(width_in, width_out, bias=False)]
            layers += [BatchNorm1d(width_out), nn.ReLU()]
        layers.append(nn.Linear(*last, bias=False))
        super().__init__(*layers)
