"""Backbones for `torch.hub`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import (
    backbone_arguments,
    load_exact,
    read_state_dict,
    rechunk_blocks,
    released_interpolation,
)

DEFAULT_IMG_SIZE = {14: 518, 16: 512}
"""Pixels for which a position embedding is made, by patch size: 37 x 37 and 32 x 32 patches."""

RELEASED: dict[str, tuple[str, int]] = {
    f"dinov2_vit{letter}14{suffix}": (arch, num_registers)
    for letter, arch in (("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large"), ("g", "vit_giant2"))
    for suffix, num_registers in (("", 0), ("_reg", 4))
}
"""Architecture and number of registers of the backbones that DINOv2 released, by their names in its hub."""

RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}{registers}_pretrain.pth"


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
            position embedding, the feed-forward layer, the registers, LayerScale and the biases are read from it
            unless given.
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
    state = rechunk_blocks(read_state_dict(weights), 0, depth=0)
    found = backbone_arguments(state, weights)
    if found["patch_size"] != patch_size:
        raise ValueError(f"expected weights for patches of {patch_size} pixels, {weights} has {found['patch_size']}")
    size = ("embed_dim", "depth", "patch_size")  # of `arch`; loading names every tensor that does not fit it
    arguments |= {name: value for name, value in found.items() if name not in size} | kwargs
    model = build_backbone(arch, patch_size=patch_size, **arguments)
    load_exact(model, rechunk_blocks(state, model.block_chunks, model.n_blocks))
    return model.eval()


def released_dinov2(name: str) -> DinoVisionTransformer:
    """Return a backbone that DINOv2 released, in evaluation mode.

    Its weights are downloaded into the cache of `torch.hub` at the first call, and read from there ever after.

    Args:
        name: as in DINOv2's hub, for example `dinov2_vits14` or `dinov2_vitl14_reg`.

    Raises:
        ValueError: for an unknown name, or a file that is no such backbone.
        OSError: if the weights cannot be downloaded; says where they are looked for.
    """
    if name not in RELEASED:
        nearest = difflib.get_close_matches(name, RELEASED, n=1, cutoff=0.0)
        raise ValueError(f"no released backbone {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(RELEASED)}")
    arch, num_registers = RELEASED[name]
    weights = _download(name, num_registers)
    return build_hub_backbone(arch, 14, weights=weights, **released_interpolation(num_registers))


def _download(name: str, num_registers: int) -> Path:
    """Return the file of released weights in the cache of `torch.hub`, after fetching it where it is not there yet."""
    base = name.removesuffix("_reg")
    url = RELEASED_URL.format(name=base, registers=f"_reg{num_registers}" if num_registers else "")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}); put that file at {path} yourself") from error
    return path
