"""Backbones to evaluate: a weight file, newly drawn weights, or no network at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.models.registry import ARCHS, build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact, read_state_dict, rechunk_blocks


def load_backbone(
    path: str | Path,
    *,
    arch: str | None = None,
    interpolate_offset: float = 0.1,
    interpolate_antialias: bool = False,
) -> DinoVisionTransformer:
    """Return the backbone in a weight file, in evaluation mode on the CPU.

    Its architecture is read off the names and shapes of the weights. What leaves no trace in them, how the position
    embedding is interpolated to another image size, is given here.

    Args:
        path: see `dinov2_equi.models.weights.read_state_dict`.
        arch: a key of `ARCHS`; None finds it by width and depth.
        interpolate_offset: see `DinoVisionTransformer`; DINOv2 released 0.1 without and 0.0 with registers.
        interpolate_antialias: see `DinoVisionTransformer`; DINOv2 released False without and True with registers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no vision transformer, or one that does not fit `arch`.
    """
    state = rechunk_blocks(read_state_dict(path), 0, depth=0)
    found = _describe_weights(state, path)
    if arch is None:
        arch = _find_arch(state, path)
    backbone = build_backbone(
        arch, interpolate_offset=interpolate_offset, interpolate_antialias=interpolate_antialias, **found
    )
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


def _describe_weights(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Return the constructor arguments that names and shapes of the weights betray."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(
            f"expected {path} to hold a DINOv2 vision transformer, but it has no {', '.join(absent)}; "
            "give the backbone's own weights or a teacher checkpoint"
        )
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    num_patches = state["pos_embed"].shape[1] - 1
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise ValueError(f"expected a square position embedding in {path}, got {num_patches} patches")
    registers = state.get("register_tokens")
    return {
        "patch_size": patch_size,
        "img_size": grid * patch_size,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "ffn_layer": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in state or "blocks.0.mlp.w12.bias" in state,
    }


def _find_arch(state: Mapping[str, Tensor], path: str | Path) -> str:
    width = state["pos_embed"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for name, arch in ARCHS.items():
        if (arch.embed_dim, arch.depth) == (width, depth):
            return name
    raise ValueError(
        f"no architecture is {width} wide and {depth} blocks deep as the weights in {path}; known: "
        + ", ".join(f"{name} ({arch.embed_dim} wide, {arch.depth} deep)" for name, arch in ARCHS.items())
    )
