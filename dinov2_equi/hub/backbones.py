"""Backbones for `torch.hub`: ours by size, patch and registers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov2_equi.equi.feature_split import split_from_record
from dinov2_equi.hub.download import cached_file, is_url, read_json
from dinov2_equi.hub.equi_backbone import EquiVisionTransformer
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.weights import (
    backbone_arguments,
    load_exact,
    read_part,
    read_state_dict,
    rechunk_blocks,
    released_interpolation,
)

DEFAULT_IMG_SIZE = {14: 518, 16: 512}
"""Pixels for which a position embedding is made, by patch size: 37 x 37 and 32 x 32 patches."""

SIZES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
"""Architectures by the letter that stands for them in the name of an entry point."""

NUM_REGISTERS = 4
"""Registers of the backbones whose name ends in `_reg`."""

BASE_ADDRESS = "DINOV2_EQUI_WEIGHTS"
"""Environment variable: address of a folder with `index.json`, {NAME: {"file": ..., "sha256": ...}}, and the files."""

EntryPoint = Callable[..., EquiVisionTransformer]


def build_hub_backbone(
    arch: str,
    patch_size: int,
    *,
    weights: str | Path | None = None,
    sha256: str | None = None,
    num_registers: int = 0,
    **kwargs: Any,
) -> EquiVisionTransformer:
    """Return a backbone built with the arguments of DINOv2's hub, in evaluation mode where weights are loaded.

    Args:
        arch: a key of `models.registry.ARCHS`.
        patch_size: side of a patch, pixels.
        weights: path or address of a weight file: a teacher checkpoint of a run, or a released DINOv2 backbone. The
            image size of the position embedding, the feed-forward layer, the registers, LayerScale and the biases are
            read from it unless given; so is the split of the features, for `split_features`.
        sha256: of a file that is downloaded.
        num_registers: registers without weights; with weights the least number that they must have.
        **kwargs: arguments of `DinoVisionTransformer` that replace the defaults `img_size` 518 (512 for patch 16),
            `init_values` 1.0, `ffn_layer` mlp (swiglufused for ViT-g) and `block_chunks` 0. How positions are
            interpolated is not written in a weight file: give `interpolate_offset` and `interpolate_antialias` where
            others than DINOv2's were trained with: 0.1 and False, with registers 0.0 and True.

    Raises:
        ValueError: if the weights do not fit, or their SHA-256 is another.
        OSError: if there is no such file, or it cannot be downloaded.
    """
    arguments: dict[str, Any] = {
        "img_size": DEFAULT_IMG_SIZE.get(patch_size, patch_size * 32),
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "block_chunks": 0,
        "num_register_tokens": num_registers,
        **released_interpolation(num_registers),
    }
    if weights is None:
        return _build(arch, patch_size, arguments | kwargs)
    path = cached_file(str(weights), sha256=sha256) if is_url(str(weights)) else Path(weights)
    state = rechunk_blocks(read_state_dict(path), 0, depth=0)
    found = backbone_arguments(state, path)
    if found["patch_size"] != patch_size:
        raise ValueError(f"expected weights for patches of {patch_size} pixels, {path} has {found['patch_size']}")
    if found["num_register_tokens"] < num_registers:
        raise ValueError(f"expected weights with registers, {path} has none; use the entry point without _reg")
    size = ("embed_dim", "depth", "patch_size")  # of `arch`; loading names every tensor that does not fit it
    arguments |= {name: value for name, value in found.items() if name not in size} | kwargs
    model = _build(arch, patch_size, arguments)
    load_exact(model, rechunk_blocks(state, model.block_chunks, model.n_blocks))
    _load_split(model, path)
    return model.eval()


def _build(arch: str, patch_size: int, arguments: dict[str, Any]) -> EquiVisionTransformer:
    model = build_backbone(arch, patch_size=patch_size, factory=EquiVisionTransformer, **arguments)
    assert isinstance(model, EquiVisionTransformer)
    return model


def _load_split(model: EquiVisionTransformer, path: Path) -> None:
    """Give a model the split of its features where the file has one."""
    record = read_part(path, "feature_split")
    if record:
        model.feature_split, model.split_block = split_from_record(record, model.embed_dim)


def published_weights(name: str) -> Path:
    """Return the published weights of an entry point, downloaded at the first call and checked against their SHA-256.

    Raises:
        ValueError: if no address of published weights is set, it has none of this name, or the file is damaged.
        OSError: without network.
    """
    base = os.environ.get(BASE_ADDRESS, "").rstrip("/")
    if not base:
        raise ValueError(
            f"no published weights exist yet for {name}: pass weights=PATH_OR_ADDRESS, or set {BASE_ADDRESS} to an "
            "address that holds an index.json and weights"
        )
    index = read_json(f"{base}/index.json")
    if name not in index:
        raise ValueError(f"{base}/index.json has no weights for {name}; it has {', '.join(index) or 'none'}")
    return cached_file(f"{base}/{index[name]['file']}", sha256=index[name]["sha256"])


def _entry_point(name: str, arch: str, patch_size: int, num_registers: int) -> EntryPoint:
    def build(
        *, pretrained: bool = False, weights: str | Path | None = None, sha256: str | None = None, **kwargs: Any
    ) -> EquiVisionTransformer:
        if pretrained and weights is None:
            weights = published_weights(name)
        return build_hub_backbone(
            arch, patch_size, weights=weights, sha256=sha256, num_registers=num_registers, **kwargs
        )

    build.__name__ = build.__qualname__ = name
    registers = f" with {num_registers} registers" if num_registers else ""
    build.__doc__ = (
        f"Return {arch} for patches of {patch_size} pixels{registers}.\n\n"
        "    weights=PATH_OR_ADDRESS loads a teacher_checkpoint.pth of ours or a backbone of DINOv2, pretrained=True\n"
        "    published weights. Normalised images [B, 3, H, W] give class tokens [B, D]; `forward_features` and\n"
        "    `get_intermediate_layers` are those of DINOv2, `split_features` gives invariant and equivariant parts.\n"
        "    "
    )
    return build


NAMES: dict[str, tuple[str, int, int]] = {
    f"dinov2_equi_vit{letter}{patch_size}{suffix}": (arch, patch_size, num_registers)
    for letter, arch in SIZES.items()
    for patch_size in DEFAULT_IMG_SIZE
    for suffix, num_registers in (("", 0), ("_reg", NUM_REGISTERS))
}
"""Architecture, patch size and number of registers of ours."""

ENTRY_POINTS: dict[str, EntryPoint] = {name: _entry_point(name, *sizes) for name, sizes in NAMES.items()}
"""Ours by name; `hubconf.py` offers them."""
