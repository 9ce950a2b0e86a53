"""What every decoder promises, and one decoder an image out of decoders of a single one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderSettings:
    """Sizes of a decoder.

    Attributes:
        equi_dim: D_equi of one view.
        patch_size: p, pixels of the decoded image that a token stands for on each side.
        num_images: images to draw, S.
        width: token width of the transformer, channels after the first layer of the up-convolutions.
        depth: number of transformer blocks.
        num_heads: attention heads; None takes heads of 32 channels.
        mlp_ratio: hidden width of the transformer's MLPs over `width`.
        shared: one module with a learned query for each image, or one module an image.
        num_channels: of the images, 3 for photographs.
    """

    equi_dim: int
    patch_size: int
    num_images: int
    width: int
    depth: int = 2
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    shared: bool = True
    num_channels: int = 3


class Decoder(Protocol):
    """A module from the tokens of two views to images."""

    patch_size: int

    def __call__(
        self, tokens_1: Tensor, tokens_2: Tensor, grid: tuple[int, int], cls: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Draw the images.

        Args:
            tokens_1: [B, N, D_equi] equivariant patch tokens of view 1.
            tokens_2: the same of view 2.
            grid: (h, w) patches, h * w = N.
            cls: equivariant class tokens of both views, [B, D_equi] each, or None.

        Returns:
            [S, B, channels, h * p, w * p] in (0, 1), float32.
        """


class OneForEachImage(nn.Module):
    """Independent decoders of one image each, as in the paper."""

    def __init__(self, decoders: Iterable[nn.Module], patch_size: int) -> None:
        """Join decoders that give [1, B, 3, H, W] each."""
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.patch_size = patch_size

    def forward(
        self, tokens_1: Tensor, tokens_2: Tensor, grid: tuple[int, int], cls: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """See `Decoder`."""
        return torch.cat([decoder(tokens_1, tokens_2, grid, cls) for decoder in self.decoders])

    def decode_patches(
        self,
        tokens_1: Tensor,
        tokens_2: Tensor,
        grid: tuple[int, int],
        chosen: Tensor,
        cls: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `TransformerDecoder.decode_patches`, which each decoder must have."""
        return torch.cat(
            [decoder.decode_patches(tokens_1, tokens_2, grid, chosen, cls) for decoder in self.decoders]  # type: ignore[operator]
        )
