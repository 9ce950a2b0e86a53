"""Maps of patch tokens of images of any size, from any backbone, frozen or trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.data.transforms import normalize
from dinov2_equi.evaluation.dense.windows import Windows, windowed_tokens
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.models.vision_transformer import DinoVisionTransformer


class BlockMap(NamedTuple):
    """Tokens after one block, through the final norm, as a map."""

    patches: Tensor
    """[B, D, h, w]."""

    cls: Tensor
    """[B, D'], the class token; D' is D but for the baseline of raw pixels."""


def last_blocks(model: EvalModel, n: int) -> tuple[int, ...]:
    """Return the numbers of the last n blocks, counted from 0; fewer where the backbone has or shows fewer."""
    return tuple(range(max(model.num_blocks - n, 0), model.num_blocks))


def spaced_blocks(model: EvalModel, n: int) -> tuple[int, ...]:
    """Return the numbers of n blocks, evenly spaced and ending with the last: 2, 5, 8, 11 of 12; repeated below n."""
    return tuple(max(model.num_blocks * (index + 1) // n - 1, 0) for index in range(n))


def freeze(backbone: nn.Module, is_frozen: bool) -> None:
    """Let the parameters of a backbone want gradients or not; the mask token plays no part and wants none."""
    backbone.requires_grad_(not is_frozen)
    if isinstance(backbone, DinoVisionTransformer):
        backbone.mask_token.requires_grad_(False)


class DenseBackbone(nn.Module):
    """A backbone that returns maps of its tokens for images of any size.

    An image whose sides are no multiples of the patch size is filled up at the bottom and on the right with the mean
    colour; what belongs to the filling is part of the maps, see `padded_size`.

    Args:
        model: the backbone with its normalisation.
        blocks: numbers of the blocks that are read, counted from 0.
        is_frozen: compute it in evaluation mode and without gradients.
        windows: blocks that attend in windows; None: none.

    Raises:
        ValueError: for a block that the backbone lacks; for a backbone of another library that is not frozen, or that
            is to attend in windows.
    """

    def __init__(
        self, model: EvalModel, blocks: Sequence[int], *, is_frozen: bool = True, windows: Windows | None = None
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 0 or max(blocks) >= model.num_blocks:
            raise ValueError(f"{model.name} has the blocks 0 to {model.num_blocks - 1}, asked for {list(blocks)}")
        if not is_frozen and not isinstance(model.backbone, DinoVisionTransformer):
            raise ValueError(f"{model.name} is a backbone of another library; only DINOv2's architecture is fine-tuned")
        if windows is not None and not isinstance(model.backbone, DinoVisionTransformer):
            raise ValueError(f"{model.name} is no backbone of DINOv2's architecture, which alone attends in windows")
        self.name = model.name
        self.backbone = model.backbone
        self.blocks = tuple(blocks)
        self.is_frozen = is_frozen
        self.windows = windows
        self.patch_size = model.patch_size
        self.num_blocks = model.num_blocks
        self.mean, self.std = model.mean, model.std
        freeze(self.backbone, is_frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> DenseBackbone:
        """Set the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.train(mode and not self.is_frozen)
        return self

    def forward(self, images: Tensor) -> list[BlockMap]:
        """Return the maps of images [B, 3, H, W] in [0, 1], not normalised, in the order of `blocks`."""
        return self.maps_of_normalized(normalize(images, self.mean, self.std))

    def maps_of_normalized(self, images: Tensor) -> list[BlockMap]:
        """Return the maps of normalised images [B, 3, H, W].

        Raises:
            ValueError: a backbone of another library takes images of its own size only.
        """
        height, width = padded_size(images.shape[-2:], self.patch_size)
        padded = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            tokens = self._checked_tokens(padded)
        grid = patch_grid(tokens[0][0].shape[1], (height, width), self.patch_size)
        return [BlockMap(p.float().transpose(1, 2).unflatten(2, grid), cls.float()) for p, cls in tokens]

    def _checked_tokens(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return `_tokens`, and say in words where another library's backbone refuses the size by an assertion."""
        if isinstance(self.backbone, DinoVisionTransformer):
            return self._tokens(images)
        try:
            return self._tokens(images)
        except AssertionError as error:
            height, width = images.shape[-2:]
            raise ValueError(
                f"{self.name} does not take images of {width} x {height} pixels ({error}); choose a backbone that "
                "takes images of any size"
            ) from error

    def _tokens(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return patch tokens [B, N, D] and class token [B, D] of every wanted block."""
        if self.windows is not None:
            assert isinstance(self.backbone, DinoVisionTransformer)
            return windowed_tokens(self.backbone, images, self.blocks, self.windows)
        if self.num_blocks == 1:
            output = self.backbone.forward_features(images)  # type: ignore[operator]
            return [(output["x_norm_patchtokens"], output["x_norm_clstoken"])] * len(self.blocks)
        first = min(self.blocks)  # every backbone knows the last n blocks, not all know blocks by number
        outputs = self.backbone.get_intermediate_layers(  # type: ignore[operator]
            images, n=self.num_blocks - first, return_class_token=True
        )
        return [outputs[block - first] for block in self.blocks]

    @torch.no_grad()
    def widths(self) -> list[tuple[int, int]]:
        """Return the channels of patch tokens and class token of every wanted block."""
        device = next((parameter.device for parameter in self.backbone.parameters()), torch.device("cpu"))
        was_training = self.training
        self.eval()
        side = padded_size((32, 32), self.patch_size)
        maps = self(torch.zeros(1, 3, *side, device=device))
        self.train(was_training)
        return [(found.patches.shape[1], found.cls.shape[1]) for found in maps]


def padded_size(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """Return (H, W) rounded up to multiples."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def patch_grid(num_patches: int, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the grid (h, w) of the patches of an image of (H, W) pixels.

    Where the tokens are not the patches (a convolutional network, raw pixels, a transformer that merges patches) it is
    the grid of this many cells that comes nearest to the shape of the image.
    """
    height, width = size
    grid = height // patch_size, width // patch_size
    if grid[0] * grid[1] == num_patches:
        return grid
    divisors = [h for h in range(1, num_patches + 1) if num_patches % h == 0]
    h = min(divisors, key=lambda rows: abs(math.log(rows * rows / num_patches * width / height)))
    return h, num_patches // h


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps [B, C, h, w] as [B, C, H, W], bilinear, pixel centres apart from the corners."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def to_image_size(maps: Tensor, size: Sequence[int], patch_size: int) -> Tensor:
    """Return maps of padded images [B, C, h, w] at the size (H, W) of the images, without the filling."""
    return upsample(maps, padded_size(size, patch_size))[..., : size[0], : size[1]]
