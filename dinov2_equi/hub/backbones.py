"""Backbones for `torch.hub`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_equi.models.registry import ARCHS, build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact, read_state_dict, rechunk_blocks

DEFAULT_IMG_SIZE = {14: 518, 16: 512}
"""Pixels for which a position embedding is made, by patch size: 37 x 37 and 32 x 32 patches."""


def dinov2_equi_vits14(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-S/14; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_small", 14, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitb14(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-B/14; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_base", 14, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitl14(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-L/14; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_large", 14, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitg14(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-g/14 with SwiGLU; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_giant2", 14, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vits16(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-S/16; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_small", 16, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitb16(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-B/16; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_base", 16, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitl16(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-L/16; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_large", 16, pretrained=pretrained, weights=weights, **kwargs)


def dinov2_equi_vitg16(
    *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return ViT-g/16 with SwiGLU; see `build_hub_backbone` for the arguments."""
    return build_hub_backbone("vit_giant2", 16, pretrained=pretrained, weights=weights, **kwargs)


def build_hub_backbone(
    arch: str, patch_size: int, *, pretrained: bool = False, weights: str | Path | None = None, **kwargs: Any
) -> DinoVisionTransformer:
    """Return a backbone built with the arguments of DINOv2's hub, in evaluation mode where weights are loaded.

    Args:
        arch: a key of `models.registry.ARCHS`.
        patch_size: side of a patch, pixels.
        pretrained: there are no published weights yet, so True without `weights` is an error.
        weights: a weight file: a teacher checkpoint of a run, or a released DINOv2 backbone. The image size of the
            position embedding, the feed-forward layer and the number of registers are read from it unless given.
        **kwargs: arguments of `DinoVisionTransformer` that replace the defaults `img_size` 518 (512 for patch 16),
            `init_values` 1.0, `ffn_layer` mlp (swiglufused for ViT-g) and `block_chunks` 0. How positions are
            interpolated is not written in a weight file: give `interpolate_offset` and `interpolate_antialias` where
            other values than 0.1 and False were trained with; those of DINOv2 with registers need 0.0 and True.

    Raises:
        ValueError: if there is nothing to load, or the weights do not fit.
    """
    if pretrained and weights is None:
        raise ValueError(
            "no published weights exist yet for this model; pass weights=PATH with a weight file, or pretrained=False"
        )
    arguments: dict[str, Any] = {
        "img_size": DEFAULT_IMG_SIZE.get(patch_size, patch_size * 32),
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "block_chunks": 0,
    }
    if weights is None:
        return build_backbone(arch, patch_size=patch_size, **(arguments | kwargs))
    state = rechunk_blocks(read_state_dict(weights), 0, ARCHS[arch].depth)
    arguments = arguments | _arguments_from_weights(state, patch_size) | kwargs
    model = build_backbone(arch, patch_size=patch_size, **arguments)
    load_exact(model, rechunk_blocks(state, model.block_chunks, model.n_blocks))
    return model.eval()


def _arguments_from_weights(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    """Return the constructor arguments that can be read off the shapes; what cannot is left to the defaults."""
    found: dict[str, Any] = {}
    if "register_tokens" in state:
        found["num_register_tokens"] = state["register_tokens"].shape[1]
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        if side * side == state["pos_embed"].shape[1] - 1:
            found["img_size"] = side * patch_size
    if "blocks.0.mlp.w12.weight" in state:
        found["ffn_layer"] = "swiglufused"
    elif "blocks.0.mlp.fc1.weight" in state:
        found["ffn_layer"] = "mlp"
    return found
