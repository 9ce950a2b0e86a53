"""Light decoder: equivariant tokens of both views -> the S images between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_equi.layers.block import Block

_TEMPERATURE = 10_000.0


def default_width(backbone_dim: int) -> int:
    """Return the decoder width for a backbone width D: half of it, a multiple of 32, at least 64."""
    return max(64, backbone_dim // 2 // 32 * 32)


def sincos_position(grid: tuple[int, int], dim: int, *, device: torch.device | None = None) -> Tensor:
    """Return fixed 2-D sine-cosine positions [h * w, dim] of a patch grid (h, w); `dim` is a multiple of 4."""
    h, w = grid
    frequencies = _TEMPERATURE ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    y = torch.arange(h, device=device, dtype=torch.float32)[:, None] * frequencies  # [h, dim / 4]
    x = torch.arange(w, device=device, dtype=torch.float32)[:, None] * frequencies  # [w, dim / 4]
    rows = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(h, w, dim // 2)
    columns = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(h, w, dim // 2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [h * w, dim]


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return images [..., 3, H, W] from flat patches [..., h * w, 3 * p * p], channel-major inside a patch."""
    h, w = grid
    leading = patches.shape[:-2]
    images = patches.reshape(*leading, h, w, 3, patch_size, patch_size)
    images = images.movedim(-3, -5).transpose(-3, -2)  # [..., 3, h, p, w, p]
    return images.reshape(*leading, 3, h * patch_size, w * patch_size)


class TransformerDecoder(nn.Module):
    """One small transformer for all path steps; a learned query says which step to draw.

    The two views' equivariant tokens are concatenated channel by channel at each grid position, projected, given a
    position and the query of a path step, mixed by a few blocks, and read out as pixels. Where class tokens are passed,
    they join as one more token. Positions are fixed, so any grid, also a non-square one, can be decoded.

    Source: Wang et al. (AAAI-26), section 3.2 for the input; the transformer replaces their up-convolutions.
    """

    def __init__(
        self,
        *,
        equi_dim: int,
        patch_size: int,
        num_steps: int,
        width: int,
        depth: int = 2,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Build the decoder.

        Args:
            equi_dim: D_equi of one view.
            patch_size: p, pixels a token stands for on each side.
            num_steps: S, number of images to draw.
            width: token width inside; a multiple of 4 and of the number of heads.
            depth: number of transformer blocks.
            num_heads: attention heads; None takes heads of 32 channels.
            mlp_ratio: hidden width of the MLPs over `width`.

        Raises:
            ValueError: if `width` does not fit positions or heads.
        """
        super().__init__()
        num_heads = max(1, width // 32) if num_heads is None else num_heads
        if width % 4 or width % num_heads:
            raise ValueError(f"decoder width must be a multiple of 4 and of its {num_heads} heads, got {width}")
        self.patch_size = patch_size
        self.width = width
        self.input_projection = nn.Linear(2 * equi_dim, width)
        self.step_queries = nn.Parameter(torch.empty(num_steps, width))
        self.layers = nn.ModuleList(
            Block(dim=width, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixel_head = nn.Linear(width, 3 * patch_size**2)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.step_queries, std=0.02)

    def forward(
        self, tokens_1: Tensor, tokens_2: Tensor, grid: tuple[int, int], cls: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Draw the images between the two views.

        Args:
            tokens_1: [B, N, D_equi] equivariant patch tokens of view 1.
            tokens_2: the same of view 2.
            grid: (h, w) patches, h * w = N.
            cls: equivariant class tokens of both views, [B, D_equi] each, or None.

        Returns:
            [S, B, 3, H, W] in (0, 1).
        """
        B, N, _ = tokens_1.shape
        S = self.step_queries.shape[0]
        x = self.input_projection(torch.cat([tokens_1, tokens_2], dim=-1))  # [B, N, width]
        x = x + sincos_position(grid, self.width, device=x.device).to(x.dtype)
        if cls is not None:
            x = torch.cat([self.input_projection(torch.cat(cls, dim=-1)).unsqueeze(1), x], dim=1)  # [B, 1 + N, width]
        x = (x + self.step_queries[:, None, None]).flatten(0, 1)  # [S * B, T, width]
        for layer in self.layers:
            x = layer(x)
        patches = self.pixel_head(self.norm(x[:, -N:]))  # [S * B, N, 3 * p * p]
        images = unpatchify(patches, grid, self.patch_size)  # [S * B, 3, H, W]
        return torch.sigmoid(images.float()).reshape(S, B, *images.shape[1:])
