"""Multi-head self-attention over packed tokens."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_equi.layers.backend import AttendFunction, attention_backend
from dinov2_equi.layers.packing import TokenLayout


class Attention(nn.Module):
    """Self-attention inside each image. Weight names and the order q, k, v are DINOv2's."""

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, proj_bias: bool = True) -> None:
        """Build the two projections.

        Raises:
            ValueError: if the width is not a multiple of the number of heads.
        """
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"expected a width that is a multiple of num_heads, got width {dim}, num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, layout: TokenLayout, attend: AttendFunction | None = None) -> Tensor:
        """Attend within each image; scores are scaled by head_dim^-0.5.

        Args:
            x: packed tokens [R, D].
            layout: where each image lies in `x`.
            attend: mixes the values of packed tokens; None: every token sees all of its image.

        Returns:
            Packed tokens [R, D].
        """
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [R, 3, heads, head_dim]
        query, key, value = qkv.unbind(1)  # each [R, heads, head_dim]
        if attend is None:
            attend = attention_backend(x.device).attend
        mixed = attend(query, key, value, layout)
        out: Tensor = self.proj(mixed.flatten(1))  # [R, D]
        return out
