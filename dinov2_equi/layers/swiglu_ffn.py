"""Gated feed-forward layer of ViT-g."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional


def swiglu_hidden_features(hidden_features: int) -> int:
    """Return the width of the gated layer that costs as much as an MLP with `hidden_features`.

    The gate is a third matrix, so the width shrinks to two thirds; it is rounded up to a multiple of 8 as kernels like.
    """
    return (int(hidden_features * 2 / 3) + 7) // 8 * 8


class SwiGLUFFN(nn.Module):
    """`w3(silu(a) * b)` with `a, b = w12(x)`: the layer behind both `swiglu` and `swiglufused`.

    Source: "GLU Variants Improve Transformer", Shazeer 2020, Equation 6.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        """Build the layer.

        Args:
            in_features: width of the input.
            hidden_features: width that a plain MLP would have; see `swiglu_hidden_features`.
            out_features: width of the output, by default `in_features`.
            act_layer: unused, the gate is always SiLU; accepted because all feed-forward layers are built alike.
            bias: give both layers a bias.
        """
        super().__init__()
        hidden = swiglu_hidden_features(hidden_features)
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # each [..., hidden]
        out: Tensor = self.w3(functional.silu(gate) * value)
        return out
