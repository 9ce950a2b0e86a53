"""Reading backbone weights from files, and loading them without surprises."""

from __future__ import annotations

import fnmatch
import logging
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.models.layouts import as_dinov2
from dinov2_equi.models.vision_transformer import chunk_size

logger = logging.getLogger(__name__)

BACKBONE_PREFIX = "backbone."
WRAPPER_KEYS = ("teacher", "model")
"""Keys under which DINOv2's training and fvcore put a state dict inside a `.pth` file."""

MAX_LISTED = 20
"""Differences of one kind that an error message names before it only counts them."""

_BLOCK_KEY = re.compile(r"^blocks\.(?:(?P<chunk>\d+)\.)?(?P<block>\d+)\.(?P<rest>.+)")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the backbone weights in a file, on the CPU.

    Three forms are understood: a flat state dict (a released backbone), one wrapped as `{"teacher": ...}` or
    `{"model": ...}`, and a teacher checkpoint, recognised by keys that start with `backbone.`: of that one the backbone
    is returned with exactly this leading `backbone.` removed, and its heads are left out. Weights of timm and
    transformers are given DINOv2's names; timm's have no mask token, which becomes 0.

    Args:
        path: a `.safetensors` file, or anything else for `torch.load(weights_only=True)`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no state dict.
    """
    state = _read_tensors(path)
    if not any(name.startswith(BACKBONE_PREFIX) for name in state):
        renamed, library = as_dinov2(state)
        if library != "dinov2":
            logger.info("%s: weights with the names of %s", path, library)
        return renamed
    backbone = _without_prefix(state, BACKBONE_PREFIX)
    if len(backbone) < len(state):
        logger.info("%s: took the backbone, left out %d other tensors (heads)", path, len(state) - len(backbone))
    return backbone


def read_part(path: str | Path, name: str) -> dict[str, Tensor]:
    """Return the weights of one part of a teacher checkpoint, such as `feature_split`, without the part's name.

    Args:
        path: see `read_state_dict`.
        name: what stands before the first dot of the keys.

    Returns:
        Names to tensors on the CPU; empty where the file has no such part, as when the part has no weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no state dict.
    """
    return _without_prefix(_read_tensors(path), f"{name}.")


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return every tensor in a file, without the wrapper around them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a weight file, but {path} does not exist or is no file; check the path")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(_has_values(v) for v in content.values()):
        raise ValueError(
            f"expected {path} to hold a state dict (names to tensors), or one under "
            f"{' or '.join(map(repr, WRAPPER_KEYS))}; got {_describe(content)}"
        )
    return {str(name): tensor for name, tensor in content.items()}


def _has_values(value: Any) -> bool:
    """Return whether this is an ordinary tensor: neither sparse nor quantised, nor one of the device meta."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); copy or download it again") from error


def _read_torch(path: Path) -> Any:
    _refuse_packed(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler meets spoiled bytes with KeyError, IndexError and others
        raise ValueError(
            f"{path} cannot be read as a file of tensors ({type(error).__name__}); it is damaged, or it holds pickled "
            "objects, which are never loaded because they can run code"
        ) from error


def _refuse_packed(path: Path) -> None:
    """Raise ValueError for a zip archive that unpacks to more than its own size; `torch.save` packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is no complete zip archive ({error}); copy or download it again") from error
    is_packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(
            f"{path} is a compressed archive, which can unpack to any size and which torch.save never writes; save the "
            "weights again with torch.save or as safetensors"
        )


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an object of type {type(content).__name__}"
    return f"a mapping with the keys {_listed(map(str, content))}" if content else "an empty mapping"


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def backbone_arguments(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Return the arguments of `DinoVisionTransformer` that names and shapes of backbone weights betray.

    `embed_dim`, `depth`, `patch_size`, `in_chans`, `img_size` (pixels; absent where the patches make no square, since a
    rectangle's sides leave no trace), `num_register_tokens`, `init_values` (1.0 with LayerScale, None without),
    `ffn_layer`, `qkv_bias`, `proj_bias`, `ffn_bias`. The number of heads, drop path and how positions are interpolated
    leave no trace either.

    Args:
        state: names to tensors, blocks in any layout.
        source: where they are from, for the error message.

    Raises:
        ValueError: if these are no weights of such a backbone; names what is missing.
    """
    state = rechunk_blocks(state, 0, depth=0)
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(
            f"expected {source} to hold a DINOv2 vision transformer, but it has no {', '.join(absent)}; "
            "give the backbone's own weights or a teacher checkpoint"
        )
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    num_patches = state["pos_embed"].shape[1] - 1
    grid = math.isqrt(num_patches)
    registers = state.get("register_tokens")
    return {
        "embed_dim": state["pos_embed"].shape[-1],
        "depth": 1 + max(int(match["block"]) for name in state if (match := _BLOCK_KEY.match(name))),
        "patch_size": patch_size,
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        **({"img_size": grid * patch_size} if grid * grid == num_patches else {}),
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "ffn_layer": _ffn_layer(state),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in state or "blocks.0.mlp.w12.bias" in state,
    }


def _ffn_layer(state: Mapping[str, Tensor]) -> str:
    if "blocks.0.mlp.w12.weight" in state:
        return "swiglufused"
    return "mlp" if "blocks.0.mlp.fc1.weight" in state else "identity"


def released_interpolation(num_register_tokens: int) -> dict[str, Any]:
    """Return how the positions of a released DINOv2 backbone are interpolated, as `DinoVisionTransformer` takes it.

    Those with registers were trained and published with other values than those without.
    """
    with_registers = num_register_tokens > 0
    return {
        "interpolate_offset": 0.0 if with_registers else 0.1,
        "interpolate_antialias": with_registers,
    }


def rechunk_blocks(state: Mapping[str, Tensor], block_chunks: int, depth: int) -> dict[str, Tensor]:
    """Return the same tensors under the names that a backbone with `block_chunks` uses.

    Args:
        state: backbone weights with names `blocks.{i}.*` or `blocks.{chunk}.{i}.*`.
        block_chunks: wanted layout: 0 for `blocks.{i}.*`, above 0 for that many chunks.
        depth: number of blocks.

    Raises:
        ValueError: if `block_chunks` does not suit the depth.
    """
    size = chunk_size(depth, block_chunks) if block_chunks else 0

    def renamed(match: re.Match[str]) -> str:
        block, rest = int(match["block"]), match["rest"]
        return f"blocks.{block // size}.{block}.{rest}" if size else f"blocks.{block}.{rest}"

    return {_BLOCK_KEY.sub(renamed, name): tensor for name, tensor in state.items()}


def resample_positions(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return backbone weights whose position embedding fits a patch grid (h, w); the other tensors stay as they are.

    Bicubic, antialiased, in float32. The class token's position is not touched. The caller says that it happened.

    Args:
        state: names to tensors, `pos_embed` [1, 1 + N, D] of a square grid.
        grid: wanted number of patches along both axes.

    Raises:
        ValueError: if the stored positions make no square.
    """
    stored = state["pos_embed"]
    side = math.isqrt(stored.shape[1] - 1)
    if side * side != stored.shape[1] - 1:
        raise ValueError(f"expected positions of a square patch grid, got {stored.shape[1] - 1} patches")
    patches = stored[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    patches = functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
    patches = patches.flatten(2).transpose(1, 2).to(stored.dtype)  # [1, h * w, D]
    return {**state, "pos_embed": torch.cat([stored[:, :1], patches], dim=1)}


def load_exact(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> None:
    """Load `state` into `module`, or change nothing and list every difference.

    Args:
        module: receives the values; dtype and device stay as they are.
        state: names to tensors.
        allow_missing: names, or patterns such as `head.*`, of the module's tensors that may keep their values.
        allow_unexpected: names or patterns that may be in `state` for nothing.

    Raises:
        ValueError: naming the tensors that are missing, unexpected, of another shape or of another kind of numbers
            (integer, real, complex); float16 for float32 is the same kind.
    """
    own = module.state_dict()
    check_exact(module, state, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    # The differences that are left were allowed by name above.
    module.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def check_exact(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> None:
    """Raise ValueError where `load_exact` would; only shapes and dtypes are looked at."""
    own = module.state_dict()
    missing = _unmatched(own.keys() - state.keys(), allow_missing)
    unexpected = _unmatched(state.keys() - own.keys(), allow_unexpected)
    shapes = [
        f"{name} (expected {list(own[name].shape)}, got {list(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    kinds = [
        f"{name} (expected {own[name].dtype}, got {state[name].dtype})"
        for name in own
        if name in state and _kind(own[name]) != _kind(state[name])
    ]
    found = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("of another kind of numbers", kinds),
    )
    problems = [f"{kind}: {_listed(names)}" for kind, names in found if names]
    if problems:
        raise ValueError(
            f"the weights do not fit {type(module).__name__}; {'; '.join(problems)}. "
            "Check the architecture, patch size, image size, ffn_layer, register tokens and block_chunks"
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _unmatched(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    return sorted(name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    rest = len(every) - MAX_LISTED
    return ", ".join(every[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
