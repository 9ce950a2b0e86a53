"""The objective of the paper: draw images from the equivariant tokens of both views."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.equi.decoders.transformer import patchify, select_patches
from dinov2_equi.equi.loss import reconstruction_error
from dinov2_equi.equi.metrics import reconstruction_metrics
from dinov2_equi.equi.tokens import EquiOutput, EquiTargets, EquiTokens


class Reconstruction(nn.Module):
    """Draws images from the tokens of two views, and measures the squared error of the pixels."""

    def __init__(self, decoder: nn.Module, patch_size: int, *, view_1_alone: bool = False) -> None:
        """Wrap a decoder.

        Args:
            decoder: see `decoders.base.Decoder`; may draw at half the resolution of the images.
            patch_size: pixels of an image that a token stands for on each side.
            view_1_alone: give the decoder view 1 twice instead of both views.
        """
        super().__init__()
        self.decoder: Any = decoder
        self.patch_size = patch_size
        self.view_1_alone = view_1_alone

    def reconstruct(self, view_1: EquiTokens, view_2: EquiTokens, size: tuple[int, int]) -> Tensor:
        """Return the images [S, B, 3, H', W'] for views of `size` = (H, W), at the resolution of the decoder.

        Raises:
            ValueError: if the number of tokens is not the patch grid of `size`; names both.
        """
        images: Tensor = self.decoder(*self._inputs(view_1, view_2, size))
        return images

    def resized(self, images: Tensor) -> Tensor:
        """Return images [S, B, 3, H, W] at the resolution of the decoder, each pixel the mean of those it covers."""
        factor = self.patch_size // self.decoder.patch_size
        return images if factor == 1 else F.avg_pool2d(images.flatten(0, 1), factor).unflatten(0, images.shape[:2])

    def forward(self, view_1: EquiTokens, view_2: EquiTokens, targets: EquiTargets) -> EquiOutput:
        """Return the mean squared error of the images from both views' features, a mean over images and patches."""
        size = (targets.images.shape[-2], targets.images.shape[-1])
        tokens_1, tokens_2, grid, cls = self._inputs(view_1, view_2, size)
        wanted = patchify(self.resized(targets.images), self.decoder.patch_size)  # [S, B, N, 3 * p * p]
        weights, chosen = targets.weights, targets.chosen
        if chosen is not None:
            drawn = self.decoder.decode_patches(tokens_1, tokens_2, grid, chosen, cls)
            wanted = select_patches(wanted, chosen)
            if weights is not None:
                weights = weights.expand(-1, tokens_1.shape[1]).gather(1, chosen)
        else:
            drawn = patchify(self.decoder(tokens_1, tokens_2, grid, cls), self.decoder.patch_size)
        errors = reconstruction_error(drawn, wanted, weights)  # [S]
        return EquiOutput(errors.mean(), reconstruction_metrics(errors))

    def _inputs(
        self, view_1: EquiTokens, view_2: EquiTokens, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, tuple[int, int], tuple[Tensor, Tensor] | None]:
        """Return what the decoder is called with."""
        second = view_1 if self.view_1_alone else view_2
        p = self.patch_size
        grid = (size[0] // p, size[1] // p)
        counts = (view_1.patches.shape[1], second.patches.shape[1])
        if counts != (grid[0] * grid[1],) * 2:
            raise ValueError(
                f"expected {grid[0]} x {grid[1]} patch tokens for a {size[0]} x {size[1]} image at patch size {p}, "
                f"got {counts[0]} and {counts[1]}"
            )
        cls = None if view_1.cls is None or second.cls is None else (view_1.cls, second.cls)
        return view_1.patches, second.patches, grid, cls
