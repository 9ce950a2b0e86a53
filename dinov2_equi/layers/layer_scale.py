"""LayerScale."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor.

    Source: "Going deeper with Image Transformers", Touvron et al. 2021, Equation 4.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        """Create `dim` factors that all start at `init_values`."""
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., D] with channel d multiplied by `gamma[d]`."""
        return x * self.gamma
