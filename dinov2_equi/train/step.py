"""One training step: gradients, guard, clip, optimiser, teacher."""

from __future__ import annotations

import math

import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.distributed.collectives import all_reduce_mean, average_gradients_
from dinov2_equi.distributed.env import get_rank
from dinov2_equi.fsdp.sharding import is_sharded, whole_tensor
from dinov2_equi.train.param_groups import apply_schedule_
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import TrainState

_SHOWN_TERMS = 4


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was NaN or infinite; weights, optimiser, teacher and centres are as before the step."""


def train_step(
    state: TrainState, batch: Batch, values: StepValues, cfg: Config, device: torch.device
) -> dict[str, float]:
    """Run one step and advance the state by one.

    Args:
        state: the run; changed in place.
        batch: one collated batch.
        values: learning rate, weight decay, momentum and temperature of this step.
        cfg: the configuration.
        device: where to compute.

    Returns:
        Losses, branch metrics and gradient norms (before clipping) by name, means over all ranks.

    Raises:
        NonFiniteLossError: before anything but gradients changed; names step, rank and term.
    """
    state.optimizer.zero_grad(set_to_none=True)
    every = cfg.logging.diagnostics_every_steps
    output = state.model.forward_backward(
        batch.to(device, non_blocking=True),
        teacher_temp=values.teacher_temp,
        diagnose=every > 0 and (state.step == 0 or (state.step + 1) % every == 0),
    )
    parameters = (p for _, module in state.model.trainable_modules() for p in module.parameters())
    average_gradients_(p for p in parameters if not is_sharded(p))  # those of the others are means already
    norms = _clip_gradients(state, cfg.optim.clip_grad)
    named = output.losses | output.metrics | norms
    mine = torch.stack([v.float() for v in named.values()])
    # Means over the ranks: the same on all of them, so that all take the same decision; NaN on one is NaN on all.
    values_of_all = all_reduce_mean(mine)
    scalars = dict(zip(named, values_of_all.tolist(), strict=True))  # one transfer
    _check_finite(scalars, state.step)
    apply_schedule_(state.optimizer, values)
    state.optimizer.step()
    state.model.update_teacher(output, values.momentum)
    state.step += 1
    return scalars


def _clip_gradients(state: TrainState, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip each sub-network on its own, as DINOv2 does; return the norms before clipping. 0 turns clipping off."""
    limit = max_norm if max_norm > 0 else math.inf
    norms = {}
    for name, module in state.model.trainable_modules():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))  # over the rows of all ranks
            torch.nn.utils.clip_grads_with_norm_(module.parameters(), limit, norm)
            norms[f"grad_norm/{name}"] = norm
    return norms


def _check_finite(scalars: dict[str, float], step: int) -> None:
    broken = {name: value for name, value in scalars.items() if not math.isfinite(value)}
    if broken:
        terms = [f"{name} = {value}" for name, value in broken.items()]
        further = f" and {len(terms) - _SHOWN_TERMS} more" if len(terms) > _SHOWN_TERMS else ""
        raise NonFiniteLossError(f"step {step}, rank {get_rank()}: {', '.join(terms[:_SHOWN_TERMS])}{further}")
