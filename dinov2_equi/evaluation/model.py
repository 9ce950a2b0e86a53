"""Backbones to evaluate: a weight file, newly drawn weights, or no network at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.models.registry import ARCHS, build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import (
    backbone_arguments,
    load_exact,
    read_state_dict,
    rechunk_blocks,
    released_interpolation,
)


def load_backbone(
    path: str | Path,
    *,
    arch: str | None = None,
    interpolate_offset: float | None = None,
    interpolate_antialias: bool | None = None,
) -> DinoVisionTransformer:
    """Return the backbone in a weight file, in evaluation mode on the CPU.

    Its architecture is read off the names and shapes of the weights. What leaves no trace in them, how the position
    embedding is interpolated to another image size, is given here.

    Args:
        path: see `dinov2_equi.models.weights.read_state_dict`.
        arch: a key of `ARCHS`; None finds it by width and depth.
        interpolate_offset: see `DinoVisionTransformer`; None as DINOv2 released such weights, 0.1 without and 0.0
            with registers.
        interpolate_antialias: see `DinoVisionTransformer`; None likewise, True with registers alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no vision transformer, or one that does not fit `arch`.
    """
    state = rechunk_blocks(read_state_dict(path), 0, depth=0)
    arguments = backbone_arguments(state, path)
    width, depth = arguments.pop("embed_dim"), arguments.pop("depth")
    if "img_size" not in arguments:
        raise ValueError(f"expected a square position embedding in {path}, got {list(state['pos_embed'].shape)}")
    interpolation = released_interpolation(arguments["num_register_tokens"])
    if interpolate_offset is not None:
        interpolation["interpolate_offset"] = interpolate_offset
    if interpolate_antialias is not None:
        interpolation["interpolate_antialias"] = interpolate_antialias
    backbone = build_backbone(arch or _find_arch(width, depth, path), **arguments, **interpolation)
    load_exact(backbone, state)
    return backbone.eval()


def random_backbone(arch: str, *, img_size: int, patch_size: int, seed: int = 0) -> DinoVisionTransformer:
    """Return an untrained backbone in evaluation mode: what any training has to beat.

    The caller's random state is not moved.

    Raises:
        ValueError: for an unknown architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch, img_size=img_size, patch_size=patch_size, init_values=1.0).eval()


class RawPixels(nn.Module):
    """The picture itself as its features, shrunk to `side` x `side`: the baseline without any network."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.side = side

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return [B, 3 * side * side] as class token and [B, side * side, 3] as patch tokens for [B, 3, H, W]."""
        small = F.adaptive_avg_pool2d(x, self.side)  # [B, 3, side, side]
        return {"x_norm_clstoken": small.flatten(1), "x_norm_patchtokens": small.flatten(2).transpose(1, 2)}


def _find_arch(width: int, depth: int, path: str | Path) -> str:
    for name, arch in ARCHS.items():
        if (arch.embed_dim, arch.depth) == (width, depth):
            return name
    raise ValueError(
        f"no architecture is {width} wide and {depth} blocks deep as the weights in {path}; known: "
        + ", ".join(f"{name} ({arch.embed_dim} wide, {arch.depth} deep)" for name, arch in ARCHS.items())
    )
