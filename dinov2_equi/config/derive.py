"""What follows from the configuration and the number of processes. The configuration itself is never changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinov2_equi.config.schema import Config

_REFERENCE_BATCH = 1024  # images; `optim.base_lr` is stated for it
_EPOCHS_BETWEEN_CHECKPOINTS = 3  # DINOv2's fixed period


@dataclass(frozen=True)
class Derived:
    """Values that a run needs and that nobody sets; all durations in steps."""

    batch_size_per_process: int
    """Images of one process in a step, in all its micro-batches."""

    effective_batch_size: int
    """Images in a step, all processes together."""

    lr: float
    """Peak learning rate after scaling."""

    total_steps: int
    """Length of the run."""

    warmup_steps: int
    """Length of the linear warm-up of the learning rate."""

    last_layer_freeze_steps: int
    """Steps during which the last layer of the heads is not trained."""

    teacher_temp_warmup_steps: int
    """Length of the linear warm-up of the teacher's temperature."""

    checkpoint_every_steps: int
    """Steps between two checkpoints."""


def derive(config: Config, *, world_size: int) -> Derived:
    """Return what follows from a validated configuration on `world_size` processes."""
    assert world_size >= 1
    epoch_length = config.train.OFFICIAL_EPOCH_LENGTH
    per_process = config.train.batch_size_per_gpu * config.train.gradient_accumulation_steps
    batch_size = per_process * world_size
    return Derived(
        batch_size_per_process=per_process,
        effective_batch_size=batch_size,
        lr=scaled_lr(config.optim.base_lr, batch_size),
        total_steps=config.optim.epochs * epoch_length,
        warmup_steps=config.optim.warmup_epochs * epoch_length,
        last_layer_freeze_steps=config.optim.freeze_last_layer_epochs * epoch_length,
        teacher_temp_warmup_steps=config.teacher.warmup_teacher_temp_epochs * epoch_length,
        checkpoint_every_steps=config.train.checkpoint_every_steps or _EPOCHS_BETWEEN_CHECKPOINTS * epoch_length,
    )


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return `base_lr * sqrt(batch_size / 1024)`, the learning rate for a step of `batch_size` images.

    Source: DINOv2's `sqrt_wrt_1024`.
    """
    return base_lr * math.sqrt(batch_size / _REFERENCE_BATCH)
