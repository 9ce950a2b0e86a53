"""Light decoder: equivariant tokens of both views -> the S images between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.layers.block import Block
from dinov2_equi.layers.packing import pack

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
    """Return images [..., C, H, W] from flat patches [..., h * w, C * p * p], channel-major inside a patch."""
    h, w = grid
    leading = patches.shape[:-2]
    images = patches.reshape(*leading, h, w, -1, patch_size, patch_size)
    images = images.movedim(-3, -5).transpose(-3, -2)  # [..., C, h, p, w, p]
    return images.reshape(*leading, -1, h * patch_size, w * patch_size)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return flat patches [..., h * w, C * p * p] of images [..., C, H, W]: the inverse of `unpatchify`."""
    leading, (C, H, W), p = images.shape[:-3], images.shape[-3:], patch_size
    patches = images.reshape(*leading, C, H // p, p, W // p, p)
    patches = patches.transpose(-3, -2).movedim(-5, -3)  # [..., h, w, C, p, p]
    return patches.reshape(*leading, (H // p) * (W // p), C * p * p)


def select_patches(patches: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen [B, n] of patches [..., B, N, C]: [..., B, n, C]."""
    index = chosen[..., None].expand(*patches.shape[:-2], -1, patches.shape[-1])
    return patches.gather(-2, index)


class TransformerDecoder(nn.Module):
    """One small transformer for all path steps; a learned query says which step to draw.

    The two views' equivariant tokens are concatenated channel by channel at each grid position, projected, given a
    position and the query of a path step, mixed by a few blocks, and read out as pixels. Where class tokens are passed,
    they join as one more token. Positions are fixed, so any grid, also a non-square one, can be decoded.

    Source: Wang et al. (AAAI-26), section 3.2 for the input; the transformer replaces their up-convolutions.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        """Build the decoder; its width is a multiple of 4 and of the number of heads.

        Raises:
            ValueError: if the width does not fit positions or heads.
        """
        super().__init__()
        width = settings.width
        num_heads = max(1, width // 32) if settings.num_heads is None else settings.num_heads
        if width % 4 or width % num_heads:
            raise ValueError(f"decoder width must be a multiple of 4 and of its {num_heads} heads, got {width}")
        self.patch_size = settings.patch_size
        self.width = width
        self.input_projection = nn.Linear(2 * settings.equi_dim, width)
        self.step_queries = nn.Parameter(torch.empty(settings.num_images, width))
        self.layers = nn.ModuleList(
            Block(dim=width, num_heads=num_heads, mlp_ratio=settings.mlp_ratio, qkv_bias=True)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixel_head = nn.Linear(width, settings.num_channels * settings.patch_size**2)
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
        """See `Decoder`."""
        positions = sincos_position(grid, self.width, device=tokens_1.device)  # [N, width]
        patches = self._decode(tokens_1, tokens_2, positions, cls)
        return unpatchify(patches, grid, self.patch_size)  # [S, B, 3, H, W]

    def decode_patches(
        self,
        tokens_1: Tensor,
        tokens_2: Tensor,
        grid: tuple[int, int],
        chosen: Tensor,
        cls: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Draw some of the patches, from the tokens at their positions alone.

        Args:
            tokens_1: [B, N, D_equi], see `Decoder`.
            tokens_2: the same of view 2.
            grid: (h, w) patches, h * w = N.
            chosen: [B, n] int64, the patches of each image.
            cls: see `Decoder`.

        Returns:
            [S, B, n, 3 * p * p] in (0, 1), float32, channel-major inside a patch.
        """
        positions = sincos_position(grid, self.width, device=tokens_1.device)[chosen]  # [B, n, width]
        return self._decode(select_patches(tokens_1, chosen), select_patches(tokens_2, chosen), positions, cls)

    def _decode(
        self, tokens_1: Tensor, tokens_2: Tensor, positions: Tensor, cls: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return patches [S, B, n, 3 * p * p] of tokens [B, n, D_equi] at positions [(B,) n, width]."""
        B, n, _ = tokens_1.shape
        x = self.input_projection(torch.cat([tokens_1, tokens_2], dim=-1))  # [B, n, width]
        x = x + positions.to(x.dtype)
        if cls is not None:
            x = torch.cat([self.input_projection(torch.cat(cls, dim=-1)).unsqueeze(1), x], dim=1)  # [B, 1 + n, width]
        x = (x + self.step_queries[:, None, None]).flatten(0, 1)  # [S * B, T, width]
        tokens, layout = pack([x])  # as in the backbone: what FSDP wraps must not return a view
        for layer in self.layers:
            tokens = layer(tokens, layout)
        x = tokens.view_as(x)[:, -n:]
        patches: Tensor = self.pixel_head(self.norm(x))  # [S * B, n, 3 * p * p]
        return torch.sigmoid(patches.float()).reshape(-1, B, n, patches.shape[-1])
