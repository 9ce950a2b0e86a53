"""Derived values against DINOv2's formulas, written out."""

from __future__ import annotations

import copy

import pytest

from dinov2_equi.config.derive import derive, scaled_lr
from dinov2_equi.config.schema import Config


def test_micro_batches_are_not_counted() -> None:
    config = Config()
    config.train.batch_size_per_gpu, config.train.gradient_accumulation_steps = 16, 4
    derived = derive(config, world_size=32)
    assert derived.batch_size_per_process == 64
    assert derived == derive(Config(), world_size=32)


def test_published_short_recipe_on_32_processes() -> None:
    derived = derive(Config(), world_size=32)
    assert derived.effective_batch_size == 64 * 32
    assert derived.lr == pytest.approx(4e-3 * 2**0.5, rel=1e-12)  # 2048 images are twice the reference of 1024
    assert derived.total_steps == 125_000
    assert derived.warmup_steps == 12_500
    assert derived.last_layer_freeze_steps == 1_250
    assert derived.teacher_temp_warmup_steps == 37_500
    assert derived.checkpoint_every_steps == 3_750


@pytest.mark.parametrize(("batch_size", "factor"), [(1024, 1.0), (256, 0.5), (4096, 2.0), (64, 0.25)])
def test_learning_rate_follows_the_square_root_of_the_batch_size(batch_size: int, factor: float) -> None:
    assert scaled_lr(0.004, batch_size) == pytest.approx(0.004 * factor, rel=1e-12)


def test_checkpoint_period_given_in_steps_is_taken_as_it_is() -> None:
    config = Config()
    config.train.checkpoint_every_steps = 7
    assert derive(config, world_size=1).checkpoint_every_steps == 7


def test_config_is_not_edited() -> None:
    config = Config()
    before = copy.deepcopy(config)
    derive(config, world_size=8)
    assert config == before
    assert config.optim.lr == 0
