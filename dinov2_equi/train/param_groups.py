"""Parameter groups of the optimiser, decided by what a parameter does rather than by what its name contains.

The backbone gets layer-wise learning-rate decay: embeddings and tokens are layer 0, block ``i`` is layer ``i + 1``
and whatever follows the blocks is layer ``depth + 1``; layer ``l`` learns with ``decay ** (depth + 1 - l)``. Biases,
normalisation layers and LayerScale are never decayed by weight decay; the learned tokens are, as in DINOv2.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinov2_equi.fsdp.sharding import mesh_of
from dinov2_equi.layers.dino_head import DINOHead
from dinov2_equi.layers.layer_scale import LayerScale
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.train.schedules import StepValues

_UNDECAYED_MODULES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    LayerScale,
)
_BACKBONE_TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens")


@dataclass(frozen=True)
class ParamRole:
    """How the optimiser treats one parameter.

    Attributes:
        lr_multiplier: factor on the scheduled learning rate.
        wd_multiplier: factor on the scheduled weight decay, 0 or 1.
        is_last_layer: whether it belongs to the prototype layer of a head, frozen at the start of a run.
    """

    lr_multiplier: float = 1.0
    wd_multiplier: float = 1.0
    is_last_layer: bool = False


def _backbone_lr_multipliers(
    backbone: DinoVisionTransformer, layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[int, float]:
    """Return the learning-rate multiplier of every backbone parameter, keyed by ``id(parameter)``."""
    blocks = backbone.block_list()
    last_layer = len(blocks) + 1
    multipliers = {id(parameter): 1.0 for parameter in backbone.parameters()}
    embedding = layerwise_decay**last_layer
    for token in _BACKBONE_TOKENS:
        parameter = getattr(backbone, token, None)
        if parameter is not None:
            multipliers[id(parameter)] = embedding
    for parameter in backbone.patch_embed.parameters():
        multipliers[id(parameter)] = embedding * patch_embed_lr_mult
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            multipliers[id(parameter)] = layerwise_decay ** (last_layer - (index + 1))
    return multipliers


def _lr_multipliers(module: nn.Module, layerwise_decay: float, patch_embed_lr_mult: float) -> dict[int, float]:
    """Return the multipliers of all backbones inside ``module``, keyed by ``id(parameter)``."""
    multipliers: dict[int, float] = {}
    for child in module.modules():
        if isinstance(child, DinoVisionTransformer):
            multipliers.update(_backbone_lr_multipliers(child, layerwise_decay, patch_embed_lr_mult))
    return multipliers


def _last_layer_ids(module: nn.Module) -> set[int]:
    """Return ``id(parameter)`` for all parameters of the prototype layers of the heads inside ``module``."""
    heads = (child for child in module.modules() if isinstance(child, DINOHead))
    return {id(parameter) for head in heads for parameter in head.last_layer.parameters()}


def _is_decayed(owner: nn.Module, leaf_name: str) -> bool:
    """Return whether weight decay acts on the parameter ``leaf_name`` that ``owner`` holds directly."""
    is_bias = leaf_name == "bias" or leaf_name.endswith("_bias")
    return not is_bias and not isinstance(owner, _UNDECAYED_MODULES)


def _trainable_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield (full name, parameter, module that holds it) for what the optimiser may move."""
    for owner_name, owner in module.named_modules(prefix=prefix):
        for leaf_name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield f"{owner_name}.{leaf_name}", parameter, owner


def _roles(
    modules: Mapping[str, nn.Module], layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[str, tuple[nn.Parameter, ParamRole]]:
    """Return parameter and role by full name; a parameter shared by two modules keeps its first name."""
    for name, value in (("layerwise_decay", layerwise_decay), ("patch_embed_lr_mult", patch_embed_lr_mult)):
        if value <= 0.0:
            raise ValueError(f"expected {name} > 0, got {value}; use 1 to switch it off")
    roles: dict[str, tuple[nn.Parameter, ParamRole]] = {}
    seen: set[int] = set()
    for prefix, module in modules.items():
        multipliers = _lr_multipliers(module, layerwise_decay, patch_embed_lr_mult)
        last_layers = _last_layer_ids(module)
        for name, parameter, owner in _trainable_parameters(module, prefix):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            roles[name] = (
                parameter,
                ParamRole(
                    lr_multiplier=multipliers.get(id(parameter), 1.0),
                    wd_multiplier=1.0 if _is_decayed(owner, name.rpartition(".")[2]) else 0.0,
                    is_last_layer=id(parameter) in last_layers,
                ),
            )
    return roles


def param_roles(
    modules: Mapping[str, nn.Module], *, layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[str, ParamRole]:
    """Return the role of every trainable parameter by its full name, ``<module key>.<name in the module>``.

    Args:
        modules: the trained parts by name, such as ``{"backbone": ..., "dino_head": ...}``.
        layerwise_decay: learning-rate decay from one backbone layer to the one below it; 1 switches it off.
        patch_embed_lr_mult: further factor on the patch embedding.

    Raises:
        ValueError: one of the factors is not positive.
    """
    roles = _roles(modules, layerwise_decay, patch_embed_lr_mult)
    return {name: role for name, (_, role) in roles.items()}


def build_param_groups(
    modules: Mapping[str, nn.Module], *, layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups, one for each distinct role, in order of first appearance.

    Sharded and whole parameters of one role are in groups of their own: the optimiser updates a group at once.

    A group holds ``params`` and their full ``names`` in the same order, and the role's ``lr_multiplier``,
    ``wd_multiplier`` and ``is_last_layer``. Parameters without ``requires_grad`` are left out; a parameter that two
    modules share appears once, under its first name.

    Args:
        modules: the trained parts by name, such as ``{"backbone": ..., "dino_head": ...}``.
        layerwise_decay: learning-rate decay from one backbone layer to the one below it; 1 switches it off.
        patch_embed_lr_mult: further factor on the patch embedding.

    Raises:
        ValueError: one of the factors is not positive, or there is nothing to train.
    """
    groups: dict[tuple[ParamRole, Hashable], dict[str, Any]] = {}
    for name, (parameter, role) in _roles(modules, layerwise_decay, patch_embed_lr_mult).items():
        group = groups.setdefault(
            (role, mesh_of(parameter)),
            {
                "params": [],
                "names": [],
                "lr_multiplier": role.lr_multiplier,
                "wd_multiplier": role.wd_multiplier,
                "is_last_layer": role.is_last_layer,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError(f"expected at least one trainable parameter in {list(modules)}, found none")
    return list(groups.values())


def apply_schedule_(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set ``lr`` and ``weight_decay`` of every group of ``build_param_groups`` to the values of one step."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.wd * group["wd_multiplier"]
