"""DINOv2's `compute_precision` keys as FSDP2: which parameters are spread over the ranks, in what number formats."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dinov2_equi.config.schema import Config, ModulePrecisionConfig
from dinov2_equi.distributed.env import get_world_size
from dinov2_equi.distributed.mesh import hybrid_mesh, whole_mesh
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.fsdp.sharding import Sharding, shard_
from dinov2_equi.layers.block import Block
from dinov2_equi.train.precision import computes_in_bf16
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

UNSHARDED = "NO_SHARD"
HYBRID = ("HYBRID_SHARD", "hybrid")
_LET_GO_AFTER_FORWARD = ("FULL_SHARD", *HYBRID)
_BACKBONE = "backbone"

Plan = Mapping[str, Sharding]
"""How each network is sharded, by its name such as `student.backbone`; a network that is not named stays whole."""


@dataclass(frozen=True)
class _Wish:
    """What the configuration says of one network."""

    strategy: str
    param_dtype: str
    reduce_dtype: str


def plan_sharding(cfg: Config, device: torch.device) -> Plan:
    """Return what is to be sharded, and say so in the log; empty in a single process, and where nothing is.

    Every rank must call it.

    Raises:
        ValueError: if the machines of a hybrid run have different numbers of ranks.
    """
    wishes = dict(_wishes(cfg))
    if get_world_size() == 1:
        return {}
    names = [name for name, wish in wishes.items() if wish.strategy != UNSHARDED]
    if not names:
        logger.info("every process holds all parameters (NO_SHARD)")
        return {}
    mesh = whole_mesh(device.type)
    across = hybrid_mesh(device.type) if any(wishes[name].strategy in HYBRID for name in names) else mesh
    is_half = computes_in_bf16(cfg, device)
    plan = {}
    for name in names:
        wish = wishes[name]
        plan[name] = Sharding(
            across if wish.strategy in HYBRID else mesh,
            # Nothing of the teacher waits for a backward pass.
            reshard_after_forward=wish.strategy in _LET_GO_AFTER_FORWARD or name.startswith("teacher."),
            param_dtype=torch.bfloat16 if is_half and wish.param_dtype != "fp32" else torch.float32,
            reduce_dtype=torch.bfloat16 if wish.reduce_dtype == "bf16" else torch.float32,
        )
    _log(wishes, plan, device)
    return plan


def _wishes(cfg: Config) -> Iterator[tuple[str, _Wish]]:
    """Yield the wish for each network of student and teacher that there is."""
    student, teacher = cfg.compute_precision.student, cfg.compute_precision.teacher
    for name in (_BACKBONE, "dino_head", *(["ibot_head"] if cfg.ibot.separate_head else [])):
        own: ModulePrecisionConfig = getattr(student, name)
        precision = own.mixed_precision
        yield f"student.{name}", _Wish(own.sharding_strategy, precision.param_dtype, precision.reduce_dtype)
        other: ModulePrecisionConfig = getattr(teacher, name)
        yield f"teacher.{name}", _Wish(other.sharding_strategy, other.mixed_precision.param_dtype, "fp32")


def _log(wishes: Mapping[str, _Wish], plan: Plan, device: torch.device) -> None:
    """Say what is done, and why where that is not what the configuration says."""
    strategies: dict[str, list[str]] = {}
    for name, wish in wishes.items():
        strategies.setdefault(wish.strategy, []).append(name)
    shown = "; ".join(f"{strategy}: {', '.join(names)}" for strategy, names in strategies.items())
    logger.info("parameters are shared out over %d processes (%s)", get_world_size(), shown)
    halves = [name for name in plan if wishes[name].param_dtype != "fp32"]
    if halves and not any(plan[name].param_dtype == torch.bfloat16 for name in halves):
        logger.info(
            "param_dtype: parameters are gathered in fp32, as compute_precision.autocast computes in fp32 on %s",
            device.type,
        )
    elif any(wishes[name].param_dtype == "fp16" for name in halves):
        logger.info("param_dtype fp16: blocks and heads are gathered in bf16, which needs no loss scaling")
    if any(wishes[name].reduce_dtype == "fp16" for name in plan):
        logger.info("reduce_dtype fp16: gradients are summed in fp32, which needs no loss scaling")


def shard_model_(model: SSLMetaArch, plan: Plan) -> None:
    """Shard a model in place: each block, each head, the decoder. Every rank must call it, before it has an optimiser.

    The decoder and VICReg's expander have no keys and follow the student's backbone. The split of the features and the
    regression of theta are small and stay whole.
    """
    for owner, networks in (("student", model.student), ("teacher", model.teacher)):
        for name, network in networks.items():
            sharding = plan.get(f"{owner}.{name}")
            if sharding is not None:
                shard_(network, sharding, inner=_blocks(network))
    sharding = plan.get(f"student.{_BACKBONE}")
    if sharding is None:
        return
    full = Sharding(sharding.mesh, sharding.reshard_after_forward)
    if model.equi is not None and isinstance(model.equi.objective, Reconstruction):
        decoder = model.equi.objective.decoder
        shard_(decoder, full, inner=_blocks(decoder), methods=_methods(decoder))
    if model.expander is not None:
        shard_(model.expander, full)


def _blocks(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def _methods(decoder: nn.Module) -> tuple[str, ...]:
    return ("decode_patches",) if hasattr(decoder, "decode_patches") else ()
