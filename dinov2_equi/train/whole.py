"""Sharded models and whole ones: building the first without ever holding the second, and back for what needs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.distributed.collectives import from_main_process
from dinov2_equi.distributed.env import is_main_process
from dinov2_equi.fsdp.sharding import is_sharded, local_part, rows_of_rank, whole_tensor
from dinov2_equi.train.sharding import Plan, shard_model_
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch


def build_without_memory(cfg: Config) -> SSLMetaArch:
    """Return a model of the meta device: names, shapes and dtypes; no random number is drawn."""
    with torch.device("meta"):
        return SSLMetaArch(cfg)


@torch.no_grad()
def materialize_sharded_(
    model: SSLMetaArch, plan: Plan, device: torch.device, make_whole: Callable[[], SSLMetaArch] | None
) -> None:
    """Shard a model of the meta device and give its parameters memory; every rank must call it.

    A rank holds its rows alone, and one whole tensor at a time. The weights are those of a model that the main process
    builds on the CPU as in a single process: the same random numbers give the same digits.

    Args:
        model: of `build_without_memory`; changed in place.
        plan: see `plan_sharding`.
        device: where the rows go.
        make_whole: builds the model that the weights are of, on the main process; None leaves them undefined, for a
            checkpoint to fill.
    """
    shard_model_(model, plan)
    model.to_empty(device=device)
    if make_whole is None:
        return
    source = make_whole().state_dict() if is_main_process() else {}
    for name, own in model.state_dict().items():
        whole = source[name].to(device) if source else torch.empty(own.shape, dtype=own.dtype, device=device)
        from_main_process(whole)
        if is_sharded(own):
            rows = rows_of_rank(own)
            local_part(own).copy_(whole[rows.start : rows.stop])
        else:
            own.copy_(whole)


@torch.no_grad()
def whole_model(model: SSLMetaArch, device: torch.device) -> SSLMetaArch | None:
    """Return the model with all parameters on the main process, None on the others; every rank must call it.

    A model that is not sharded is returned as it is; of a sharded one the main process gets a copy.

    Args:
        model: the model.
        device: where the copy goes.
    """
    state = model.state_dict()
    if not any(is_sharded(tensor) for tensor in state.values()):
        return model if is_main_process() else None
    whole, target = None, dict[str, Tensor]()
    if is_main_process():
        whole = build_without_memory(model.cfg).to_empty(device=device).train(model.training)
        target = whole.state_dict()
    for name, own in state.items():
        tensor = whole_tensor(own)
        if target:
            target[name].copy_(tensor)
    return whole
