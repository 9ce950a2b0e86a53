"""Values that change from step to step: learning rate, weight decay, EMA momentum, teacher temperature.

A schedule is a pure function of the step, so that a resumed run needs nothing but the step number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _linspace_value(start: float, stop: float, num: int, index: int) -> float:
    """Return element ``index`` of ``num`` evenly spaced values from ``start`` to ``stop``, both included."""
    if num == 1:
        return start
    if index == num - 1:
        return stop
    return start + index * ((stop - start) / (num - 1))


@dataclass(frozen=True)
class CosineSchedule:
    """Zero while frozen, then a linear warm-up, then half a cosine from ``base_value`` to ``final_value``.

    Indexing with a step gives the value at that step; every step from ``total_iters`` on gives ``final_value``.
    The warm-up includes both of its ends: its first step has ``start_warmup_value`` and its last ``base_value``
    (a warm-up of a single step has only the first).

    Args:
        base_value: value at the start of the cosine.
        final_value: value the cosine tends to.
        total_iters: steps of freeze, warm-up and cosine together.
        warmup_iters: steps of linear warm-up.
        start_warmup_value: value of the first warm-up step.
        freeze_iters: leading steps with value 0.

    Raises:
        ValueError: a count is negative, or freeze and warm-up are longer than the whole.
    """

    base_value: float
    final_value: float
    total_iters: int
    warmup_iters: int = 0
    start_warmup_value: float = 0.0
    freeze_iters: int = 0

    def __post_init__(self) -> None:
        """Refuse counts that cannot be laid out on one line of steps."""
        counts = {"total": self.total_iters, "warm-up": self.warmup_iters, "freeze": self.freeze_iters}
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"expected a number of {name} steps >= 0, got {count}")
        if self.warmup_iters + self.freeze_iters > self.total_iters:
            raise ValueError(
                f"expected freeze and warm-up to fit into the {self.total_iters} steps of the schedule, got "
                f"{self.freeze_iters} + {self.warmup_iters} steps; shorten the warm-up or train for longer"
            )

    def __getitem__(self, step: int) -> float:
        """Return the value at ``step``, counted from 0.

        Raises:
            IndexError: ``step`` is negative.
        """
        if step < 0:
            raise IndexError(f"expected a step >= 0, got {step}")
        if step >= self.total_iters:
            return self.final_value
        if step < self.freeze_iters:
            return 0.0
        warmup_step = step - self.freeze_iters
        if warmup_step < self.warmup_iters:
            return _linspace_value(self.start_warmup_value, self.base_value, self.warmup_iters, warmup_step)
        cosine_iters = self.total_iters - self.freeze_iters - self.warmup_iters
        phase = math.pi * (warmup_step - self.warmup_iters) / cosine_iters
        return self.final_value + 0.5 * (self.base_value - self.final_value) * (1 + math.cos(phase))


@dataclass(frozen=True)
class StepValues:
    """What one step uses.

    Attributes:
        lr: learning rate before the multipliers of the parameter groups.
        wd: weight decay before the multipliers of the parameter groups.
        momentum: EMA momentum of the teacher.
        teacher_temp: temperature of the teacher's softmax.
        last_layer_lr: ``lr`` of the prototype layers, 0 while these are frozen.
    """

    lr: float
    wd: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; built by ``build_schedules``."""

    lr: CosineSchedule
    wd: CosineSchedule
    momentum: CosineSchedule
    teacher_temp: CosineSchedule
    freeze_last_layer_steps: int

    def at(self, step: int) -> StepValues:
        """Return the values of ``step``, counted from 0."""
        lr = self.lr[step]
        return StepValues(
            lr=lr,
            wd=self.wd[step],
            momentum=self.momentum[step],
            teacher_temp=self.teacher_temp[step],
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
        )


def build_schedules(
    *,
    lr: float,
    min_lr: float,
    wd: float,
    wd_end: float,
    momentum: float,
    final_momentum: float,
    warmup_teacher_temp: float,
    teacher_temp: float,
    total_steps: int,
    warmup_steps: int,
    freeze_last_layer_steps: int,
    temp_warmup_steps: int,
) -> Schedules:
    """Return the schedules of a run.

    Args:
        lr: learning rate at the end of the warm-up, already scaled with the batch size.
        min_lr: learning rate at the end of the run.
        wd: weight decay at the start.
        wd_end: weight decay at the end.
        momentum: EMA momentum at the start.
        final_momentum: EMA momentum at the end.
        warmup_teacher_temp: teacher temperature at step 0.
        teacher_temp: teacher temperature after its warm-up, constant from there.
        total_steps: steps of the run.
        warmup_steps: steps in which the learning rate grows linearly from 0 to ``lr``.
        freeze_last_layer_steps: leading steps in which the prototype layers do not move.
        temp_warmup_steps: steps in which the teacher temperature grows linearly; may exceed ``total_steps``.

    Raises:
        ValueError: ``warmup_steps`` exceeds ``total_steps``, or a count is negative.
    """
    if freeze_last_layer_steps < 0:
        raise ValueError(f"expected freeze_last_layer_steps >= 0, got {freeze_last_layer_steps}")
    return Schedules(
        lr=CosineSchedule(lr, min_lr, total_steps, warmup_iters=warmup_steps),
        wd=CosineSchedule(wd, wd_end, total_steps),
        momentum=CosineSchedule(momentum, final_momentum, total_steps),
        teacher_temp=CosineSchedule(
            teacher_temp,
            teacher_temp,
            temp_warmup_steps,
            warmup_iters=temp_warmup_steps,
            start_warmup_value=warmup_teacher_temp,
        ),
        freeze_last_layer_steps=freeze_last_layer_steps,
    )
