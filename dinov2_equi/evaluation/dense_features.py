"""Maps of patch features of images of any size, for tasks that ask something of every place."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.transforms import normalize
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.features import eval_mode
from dinov2_equi.evaluation.foreign import TimmTokens

DENSE_FEATURES = ("patches", "invariant", "equivariant")
"""Patch tokens, and the two parts of them where a backbone's channels are divided."""


def whole_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the (H, W) nearest to `size` whose sides are whole numbers of patches, at least one."""
    height, width = (max(math.floor(side / patch_size + 0.5), 1) * patch_size for side in size)
    return height, width


def fit_size(size: tuple[int, int], wanted: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the (H, W) an image of (H, W) pixels is resampled to, in whole patches.

    The shorter side becomes `wanted` and the aspect ratio is kept; then each side is rounded to the nearest multiple of
    the patch size. That changes the aspect ratio by less than a patch, and nothing is cut off or padded.

    Args:
        size: (H, W) of the image.
        wanted: length of the shorter side, pixels; or both sides (H, W), and the aspect ratio is not kept.
        patch_size: of the backbone.
    """
    if isinstance(wanted, int):
        factor = wanted / min(size)
        wanted = (round(size[0] * factor), round(size[1] * factor))
    return whole_patches(wanted, patch_size)


def resample(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images [B, 3, H, W] in [0, 1] at another size (H, W): bicubic with antialiasing, clipped to [0, 1]."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def at_image_size(model: EvalModel, size: tuple[int, int]) -> EvalModel:
    """Return a backbone that takes images of (H, W) pixels: itself, or a copy where its library fixes the size.

    Models of timm are built for one size. The copy's position embedding is resampled by timm from the trained one, so
    going from size to size never resamples what was resampled.
    """
    if not isinstance(model.backbone, TimmTokens) or not hasattr(model.backbone.model, "set_input_size"):
        return model
    backbone = copy.deepcopy(model.backbone)
    backbone.model.set_input_size(img_size=size)  # type: ignore[operator]
    return replace(model, backbone=backbone)


def feature_map(model: EvalModel, images: Tensor, *, features: str = "patches") -> Tensor:
    """Return the patch features of images as a map [B, D, h, w] float32; gradients flow where they are enabled.

    The mode of the backbone is left as it is: see `frozen_feature_map` for measurements.

    Args:
        model: its weights live on the device of the images.
        images: [B, 3, H, W] in [0, 1], not normalised; sides are multiples of the patch size.
        features: one of `DENSE_FEATURES`.

    Raises:
        ValueError: for unknown features, or a part of a backbone that is not divided.
    """
    check_features(model, features)
    x = normalize(images, model.mean, model.std)
    wants_block = features == "equivariant" and model.split_block is not None
    options = {"more_blocks": (model.split_block,)} if wants_block else {}
    output = model.backbone.forward_features(x, **options)  # type: ignore[operator]
    tokens = output["x_norm_patchtokens"]  # [B, N, D]
    if wants_block:
        tokens = output["x_norm_blocks"][0][:, -tokens.shape[1] :]  # [B, N, D]
    if features != "patches":
        assert model.split is not None
        tokens = model.split.invariant(tokens) if features == "invariant" else model.split.equivariant(tokens)
    grid = token_grid(tokens.shape[1], (images.shape[-2], images.shape[-1]), model.patch_size)
    maps: Tensor = tokens.float().transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    return maps


def frozen_feature_map(model: EvalModel, images: Tensor, *, features: str = "patches") -> Tensor:
    """Return `feature_map` in evaluation mode without gradients."""
    with eval_mode(model.backbone), torch.no_grad():
        return feature_map(model, images, features=features)


def check_features(model: EvalModel, features: str) -> None:
    """Refuse features that a backbone does not have.

    Raises:
        ValueError: names those it has.
    """
    known = DENSE_FEATURES if model.split is not None else DENSE_FEATURES[:1]
    if features not in known:
        raise ValueError(f"{model.name} has no features {features!r}; it has {', '.join(known)}")


def token_grid(num_tokens: int, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the grid (h, w) of N patch tokens of an (H, W) image.

    Where the tokens are not those of whole patches, as of a convolutional network, the grid is the pair of factors of N
    whose shape is nearest to the image's.
    """
    H, W = size
    if patch_size > 1 and num_tokens == (H // patch_size) * (W // patch_size):
        return H // patch_size, W // patch_size
    heights = [h for h in range(1, num_tokens + 1) if num_tokens % h == 0]
    best = min(heights, key=lambda h: abs(math.log(h * h / num_tokens) - math.log(H / W)))
    return best, num_tokens // best
