"""Weights of a DINOv2 backbone under the names of timm and of transformers, and back under DINOv2's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_TRANSFORMERS_NAMES = (
    # As published, and as every version writes and reads them in files; the patterns stand for whole names.
    (r"cls_token", "embeddings.cls_token"),
    (r"mask_token", "embeddings.mask_token"),
    (r"register_tokens", "embeddings.register_tokens"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.(norm[12])\.(weight|bias)", r"encoder.layer.\1.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"encoder.layer.\1.mlp.\2.\3"),
    (r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"encoder.layer.\1.mlp.weights_in.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"encoder.layer.\1.mlp.weights_out.\2"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
)
_QKV = r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)"
_QKV_OF_TRANSFORMERS = tuple(rf"encoder.layer.\1.attention.attention.{part}.\2" for part in ("query", "key", "value"))
_NAMES_IN_MEMORY = (
    # What late versions of transformers 5 call them in a loaded model, and the published names.
    (r"(.*)\.attention\.q_proj\.(weight|bias)", r"\1.attention.attention.query.\2"),
    (r"(.*)\.attention\.k_proj\.(weight|bias)", r"\1.attention.attention.key.\2"),
    (r"(.*)\.attention\.v_proj\.(weight|bias)", r"\1.attention.attention.value.\2"),
    (r"(.*)\.attention\.o_proj\.(weight|bias)", r"\1.attention.output.dense.\2"),
    (r"(.*)\.mlp\.down_proj\.(weight|bias)", r"\1.mlp.weights_out.\2"),
)
_BLOCK_OF_TRANSFORMERS = r"encoder\.layer\.(\d+)\."


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """Return DINOv2's weights (flat blocks) as the files of Dinov2Model or Dinov2WithRegistersModel hold them.

    Raises:
        ValueError: for a name that has no counterpart there.
    """
    result: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(_QKV, name):
            names = [match.expand(template) for template in _QKV_OF_TRANSFORMERS]
            result |= zip(names, (piece.contiguous() for piece in tensor.chunk(len(names))), strict=True)
        else:
            result[_renamed(name, _TRANSFORMERS_NAMES)] = tensor
    return result


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Return weights of transformers, of a file or of a loaded model of any version, under DINOv2's names.

    Raises:
        ValueError: for a name that has no counterpart here.
    """
    published = _published_names(state)
    depth = 1 + max((int(m[1]) for name in published if (m := re.match(_BLOCK_OF_TRANSFORMERS, name))), default=-1)
    result: State = {}
    for name in _dinov2_names(depth):
        if match := re.fullmatch(_QKV, name):
            names = [match.expand(template) for template in _QKV_OF_TRANSFORMERS]
            if names[0] in published:
                result[name] = torch.cat([published.pop(part) for part in names])
        elif (theirs := _renamed(name, _TRANSFORMERS_NAMES)) in published:
            result[name] = published.pop(theirs)
    _check_all_used(published, "transformers")
    return result


def _published_names(state: Mapping[str, Tensor]) -> State:
    result: State = {}
    for name, tensor in state.items():
        for pattern, template in _NAMES_IN_MEMORY:
            name = re.sub(rf"^{pattern}$", template, name)
        if match := re.fullmatch(r"(.*)\.mlp\.gate_proj\.(weight|bias)", name):
            up = state[f"{match[1]}.mlp.up_proj.{match[2]}"]
            result[f"{match[1]}.mlp.weights_in.{match[2]}"] = torch.cat([tensor, up])
        elif not re.fullmatch(r".*\.mlp\.up_proj\.(weight|bias)", name):
            result[name] = tensor
    return result


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Return DINOv2's weights (flat blocks) as timm's `vit_*_patch14_dinov2` and `vit_*_patch14_reg4_dinov2` name them.

    timm has no mask token. In a backbone with registers its class token includes its position.
    """
    result = {_gated(name, to_fused=True): tensor for name, tensor in state.items() if name != "mask_token"}
    if "register_tokens" in result:
        positions = result["pos_embed"]
        result["reg_token"] = result.pop("register_tokens")
        result["cls_token"] = result["cls_token"] + positions[:, :1]
        result["pos_embed"] = positions[:, 1:].contiguous()
    return result


def from_timm(state: Mapping[str, Tensor]) -> State:
    """Return timm's weights under DINOv2's names; the mask token, which timm lacks, is 0.

    A class token that includes its position stays as it is, and its position becomes 0: the same sum.
    """
    is_gated = "blocks.0.mlp.fc1.weight" in state and (
        state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    )
    result = {_gated(name, to_fused=False) if is_gated else name: tensor for name, tensor in state.items()}
    if "reg_token" in result:
        result["register_tokens"] = result.pop("reg_token")
        positions = result["pos_embed"]
        result["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    result["mask_token"] = torch.zeros_like(result["cls_token"][0])  # [1, D]
    return result


def as_dinov2(state: Mapping[str, Tensor]) -> tuple[State, str]:
    """Return backbone weights under DINOv2's names, and which library named them: `dinov2`, `timm` or `transformers`.

    Raises:
        ValueError: for weights of transformers with a part that DINOv2's backbones lack.
    """
    for prefix in (
        "dinov2_with_registers.",
        "dinov2.",
        "",
    ):  # a classifier of transformers holds the backbone in a part
        if f"{prefix}embeddings.cls_token" in state:
            backbone = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            return from_transformers(backbone), "transformers"
    has_blocks = any(name.startswith("blocks.") for name in state)
    if has_blocks and "cls_token" in state and "mask_token" not in state:
        return from_timm({name: t for name, t in state.items() if not name.startswith("head.")}), "timm"
    return dict(state), "dinov2"


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, template in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    raise ValueError(f"{name} has no counterpart in transformers; export a backbone with the names of DINOv2")


def _gated(name: str, *, to_fused: bool) -> str:
    """Return timm's name of a layer of a gated feed-forward (`w12`, `w3`), or DINOv2's of timm's (`fc1`, `fc2`)."""
    pairs = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
    for ours, theirs in pairs:
        name = name.replace(ours, theirs) if to_fused else name.replace(theirs, ours)
    return name


def _dinov2_names(depth: int) -> list[str]:
    """Return every name that a DINOv2 backbone may have."""
    names = ["cls_token", "pos_embed", "register_tokens", "mask_token"]
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
    modules = ["patch_embed.proj", *(f"blocks.{block}.{layer}" for block in range(depth) for layer in layers), "norm"]
    names += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return names + [f"blocks.{block}.ls{number}.gamma" for block in range(depth) for number in (1, 2)]


def _check_all_used(rest: Mapping[str, Tensor], library: str) -> None:
    if rest:
        raise ValueError(
            f"these weights of {library} have no counterpart in a DINOv2 backbone: {', '.join(list(rest)[:10])}"
        )
