"""Projection head of DINO and iBOT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `g * v / ||v||`.

    Holds `weight_g` [K, 1] and `weight_v` [K, D], the names of the released DINOv2 heads.
    Source: "Weight Normalization", Salimans and Kingma 2016, Equation 2.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Start with unit rows in random directions."""
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # what `nn.Linear` does

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., K]."""
        norm = self.weight_v.norm(dim=1, keepdim=True)  # [K, 1]
        weight = self.weight_v * (self.weight_g / norm.clamp_min(torch.finfo(norm.dtype).tiny))  # [K, D]
        return functional.linear(x, weight)


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, then one logit for each prototype.

    Source: "Emerging Properties in Self-Supervised Vision Transformers", Caron et al. 2021, appendix C.
    """

    def __init__(  # noqa: PLR0917 - the order of DINOv2's arguments
        self,
        in_dim: int,
        out_dim: int,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        """Build the head.

        Args:
            in_dim: width D of the tokens.
            out_dim: number K of prototypes.
            nlayers: linear layers before the prototypes, at least 1.
            hidden_dim: width between these layers.
            bottleneck_dim: width that is normalised and compared with the prototypes.
            mlp_bias: give the layers before the prototypes a bias.

        Raises:
            ValueError: if `nlayers` is below 1.
        """
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"expected nlayers >= 1, got {nlayers}")
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(nlayers):
            if index > 0:
                layers.append(nn.GELU())
            layers.append(_small_normal_linear(widths[index], widths[index + 1], bias=mlp_bias))
        # The released heads name a single layer `mlp.weight`, several `mlp.{0,2,...}.weight`.
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., D] to logits [..., K]. Without autocast of the dtype of the weights."""
        x = self.mlp(x)  # [..., bottleneck]
        # 1e-12 is zero in float16, and a zero token would become NaN; 1 / eps, its gradient, must not overflow either.
        eps = 1e-4 if x.dtype == torch.float16 else 1e-12
        x = functional.normalize(x, dim=-1, p=2, eps=eps)
        logits: Tensor = self.last_layer(x)
        return logits


def _small_normal_linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
