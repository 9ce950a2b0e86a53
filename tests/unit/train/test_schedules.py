"""Schedules against DINOv2's arrays and against the formulas written out with NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2_equi.train.schedules import CosineSchedule, Schedules, build_schedules

TABLES = Path(__file__).parents[2] / "parity" / "reference" / "tables.json"

# The same float64 expression evaluated by NumPy and by `math`: their cosines may differ in the last bit.
REL = 1e-14


def reference_array(base: float, final: float, total: int, warmup: int, start: float, freeze: int) -> np.ndarray:
    """Return DINOv2's schedule as an array."""
    cosine_steps = np.arange(total - warmup - freeze)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * cosine_steps / max(len(cosine_steps), 1)))
    return np.concatenate([np.zeros(freeze), np.linspace(start, base, warmup), cosine])


def make_schedules(**changes: Any) -> Schedules:
    arguments: dict[str, Any] = {
        "lr": 4e-3,
        "min_lr": 1e-6,
        "wd": 0.04,
        "wd_end": 0.4,
        "momentum": 0.992,
        "final_momentum": 1.0,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "total_steps": 100,
        "warmup_steps": 10,
        "freeze_last_layer_steps": 5,
        "temp_warmup_steps": 30,
    }
    return build_schedules(**(arguments | changes))


def test_cosine_equals_the_reference_values() -> None:
    reference = json.loads(TABLES.read_text())["cosine"]
    schedule = CosineSchedule(**reference["args"])
    values = {step: schedule[int(step)] for step in reference["values"]}
    assert values == pytest.approx(reference["values"], rel=REL)


@pytest.mark.parametrize(
    ("total", "warmup", "freeze"),
    [(20, 0, 0), (20, 5, 0), (20, 5, 3), (20, 1, 0), (20, 2, 0), (20, 20, 0), (20, 0, 20), (20, 12, 8), (1, 0, 0)],
)
def test_every_step_equals_the_array(total: int, warmup: int, freeze: int) -> None:
    expected = reference_array(0.5, 0.01, total, warmup, 0.1, freeze)
    schedule = CosineSchedule(0.5, 0.01, total, warmup, 0.1, freeze)
    assert [schedule[step] for step in range(total)] == pytest.approx(expected.tolist(), rel=REL)


def test_beyond_the_end_is_the_final_value() -> None:
    schedule = CosineSchedule(1.0, 0.25, 10)
    assert [schedule[10], schedule[11], schedule[10**9]] == [0.25, 0.25, 0.25]


def test_empty_schedule_is_its_final_value() -> None:
    assert CosineSchedule(1.0, 0.25, 0)[0] == 0.25


def test_rising_cosine_never_overshoots() -> None:
    values = [CosineSchedule(0.04, 0.4, 50)[step] for step in range(60)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.04, rel=REL)
    assert values[-1] == 0.4


def test_negative_step_does_not_wrap_around() -> None:
    with pytest.raises(IndexError, match="-1"):
        CosineSchedule(1.0, 0.0, 10)[-1]


def test_warmup_longer_than_the_run_is_explained() -> None:
    with pytest.raises(ValueError, match=r"fit into the 10 steps.*0 \+ 11.*shorten the warm-up"):
        CosineSchedule(1.0, 0.0, 10, warmup_iters=11)
    with pytest.raises(ValueError, match="shorten the warm-up"):
        make_schedules(total_steps=9)


@pytest.mark.parametrize("counts", [(-1, 0, 0), (10, -1, 0), (10, 0, -1)])
def test_negative_counts_are_refused(counts: tuple[int, int, int]) -> None:
    total, warmup, freeze = counts
    with pytest.raises(ValueError, match="got -1"):
        CosineSchedule(1.0, 0.0, total, warmup_iters=warmup, freeze_iters=freeze)


def test_teacher_temperature_rises_linearly_then_stays() -> None:
    schedules = make_schedules()
    expected = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(75, 0.07)])
    assert [schedules.at(step).teacher_temp for step in range(105)] == pytest.approx(expected.tolist(), rel=REL)


def test_teacher_temperature_warmup_may_outlast_a_short_run() -> None:
    schedules = make_schedules(temp_warmup_steps=1000)
    assert schedules.at(99).teacher_temp == pytest.approx(np.linspace(0.04, 0.07, 1000)[99], rel=REL)


def test_teacher_temperature_without_warmup_is_constant() -> None:
    assert {make_schedules(temp_warmup_steps=0).at(step).teacher_temp for step in range(100)} == {0.07}


def test_last_layer_is_frozen_then_follows_the_learning_rate() -> None:
    schedules = make_schedules()
    values = [schedules.at(step) for step in range(100)]
    assert all(value.last_layer_lr == 0.0 for value in values[:5])
    assert values[4].lr > 0.0, "only the last layer is frozen"
    assert [value.last_layer_lr for value in values[5:]] == [value.lr for value in values[5:]]


def test_each_value_follows_its_own_schedule() -> None:
    schedules = make_schedules()
    lr = reference_array(4e-3, 1e-6, 100, 10, 0.0, 0)
    wd = reference_array(0.04, 0.4, 100, 0, 0.0, 0)
    momentum = reference_array(0.992, 1.0, 100, 0, 0.0, 0)
    for step in range(100):
        values = schedules.at(step)
        assert (values.lr, values.wd, values.momentum) == pytest.approx((lr[step], wd[step], momentum[step]), rel=REL)


def test_negative_freeze_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze_last_layer_steps"):
        make_schedules(freeze_last_layer_steps=-1)
