"""Steps that are not finite: skipped, gone back from, and stopped by, with a bundle that shows the step again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.train.guard import GuardedSteps
from dinov2_equi.train.replay import replay_step
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import NonFiniteLossError

MakeConfig = Callable[..., Config]
MakeState = Callable[[Config], TrainState]
MakeBatch = Callable[..., Batch]
Snapshot = Callable[[TrainState], dict[str, Tensor]]
Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]
CPU = torch.device("cpu")


def weights(state: TrainState, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return all that a step may change, but its number."""
    return {name: tensor for name, tensor in snapshot(state).items() if name != "step"}


class Guarded:
    """A run with its guard, and what its steps are made of."""

    def __init__(self, cfg: Config, state: TrainState, make_batch: MakeBatch, values: StepValues, folder: Path) -> None:
        self.cfg, self.state, self.values, self.folder = cfg, state, values, folder
        self.store = CheckpointStore(folder / "checkpoints")
        self.steps = GuardedSteps(state, cfg, store=self.store, device=CPU, output_dir=folder)
        self._make_batch = make_batch

    def good(self, seed: int = 0) -> dict[str, float] | None:
        return self.steps.run(self._make_batch(self.cfg, seed=seed), self.values)

    def bad(self, value: float = math.nan) -> dict[str, float] | None:
        batch = self._make_batch(self.cfg)
        batch.global_crops[0, 0, 0, 0] = value
        return self.steps.run(batch, self.values)


@pytest.fixture
def guarded(
    make_config: MakeConfig, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues, tmp_path: Path
) -> Guarded:
    cfg = make_config("train.centering=centering", "train.max_nonfinite_steps=2", "student.drop_path_rate=0.3")
    return Guarded(cfg, make_state(cfg), make_batch, step_values, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_batch_reaches_the_weights_or_ends_the_run(
    value: float, guarded: Guarded, snapshot: Snapshot, assert_same_bits: Compare
) -> None:
    assert guarded.good() is not None
    before = weights(guarded.state, snapshot)
    assert guarded.bad(value) is None
    assert_same_bits(before, weights(guarded.state, snapshot))
    assert (guarded.state.step, guarded.state.skipped, guarded.steps.is_sound) == (2, 1, False)
    figures = guarded.good(1)
    assert figures is not None and figures["skipped_steps"] == 1 and guarded.steps.is_sound


def test_single_broken_steps_add_up_to_a_stop(guarded: Guarded) -> None:
    for seed in range(3):
        assert guarded.bad() is None
        assert guarded.good(seed) is not None
    assert guarded.state.skipped == 3


def test_steps_broken_in_a_row_do_not_lead_back_to_the_last_checkpoint(
    guarded: Guarded, snapshot: Snapshot, assert_same_bits: Compare
) -> None:
    guarded.good()
    guarded.state.save(guarded.store, guarded.cfg)
    saved = weights(guarded.state, snapshot)
    guarded.good(1)
    guarded.bad()
    guarded.bad()
    assert_same_bits(saved, weights(guarded.state, snapshot))
    # The images go on: those that follow, not those that led here.
    assert (guarded.state.step, guarded.state.skipped) == (4, 2)
    assert guarded.good(2) is not None


def test_the_same_checkpoint_is_gone_back_to_for_ever(guarded: Guarded) -> None:
    guarded.good()
    guarded.state.save(guarded.store, guarded.cfg)
    guarded.bad()
    guarded.bad()
    guarded.bad()
    with pytest.raises(NonFiniteLossError, match="2 steps in a row.*step 1 did not help.*scripts/replay.py"):
        guarded.bad()


def test_weights_that_were_gone_back_to_are_saved_and_gone_back_to_for_ever(guarded: Guarded) -> None:
    guarded.good()
    guarded.state.save(guarded.store, guarded.cfg)
    with pytest.raises(NonFiniteLossError, match="did not help"):
        for _ in range(10):
            guarded.bad()
            if guarded.steps.is_sound:  # as the loop does, where a checkpoint is due after every step
                guarded.state.save(guarded.store, guarded.cfg)
    assert guarded.store.steps() == [1]


def test_newest_checkpoint_is_damaged_and_the_one_before_it_is_gone_back_to_for_ever(guarded: Guarded) -> None:
    for seed in range(2):
        guarded.good(seed)
        guarded.state.save(guarded.store, guarded.cfg)
    (newest,) = guarded.store.directory.glob("step_*2")
    (newest / "state.json").write_text("{}")
    with pytest.raises(NonFiniteLossError, match="did not help"):
        for _ in range(10):
            guarded.bad()


def test_a_newer_checkpoint_is_not_gone_back_to(guarded: Guarded) -> None:
    for seed in range(2):
        guarded.good(seed)
        guarded.state.save(guarded.store, guarded.cfg)
        guarded.bad()
        guarded.bad()
    assert guarded.state.skipped == 4


def test_a_bundle_does_not_show_the_step_again(guarded: Guarded) -> None:
    guarded.good()
    guarded.bad()
    with pytest.raises(NonFiniteLossError, match="no checkpoint yet"):
        guarded.bad()
    replay = replay_step(guarded.folder / "replay" / "step_00000003", CPU)
    assert not replay.is_finite
    assert math.isnan(replay.losses["total_loss"])
    assert replay.first_module == "student.backbone.patch_embed.proj" or "teacher" in str(replay.first_module)
    assert any(name.startswith("student.backbone") for name in replay.gradients)


def test_the_random_state_of_a_bundle_is_another_one(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is sound but for what was added to its loss: run again, its losses are the same to the bit."""
    seen: list[dict[str, float]] = []
    original = type(guarded.state.model).forward_backward

    def spoiled(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        output = original(model, *args, **kwargs)  # type: ignore[arg-type]
        seen.append({name: float(loss) for name, loss in output.losses.items()})
        output.losses["total_loss"].fill_(math.nan)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(type(guarded.state.model), "forward_backward", spoiled)
        guarded.good()
        with pytest.raises(NonFiniteLossError):
            guarded.good(1)
    replay = replay_step(guarded.folder / "replay" / "step_00000002", CPU)
    assert replay.is_finite
    assert replay.losses == seen[-1]


def test_a_checkpoint_is_taken_for_a_bundle(guarded: Guarded) -> None:
    guarded.good()
    path = guarded.state.save(guarded.store, guarded.cfg)
    with pytest.raises(CheckpointError, match="no bundle"):
        replay_step(guarded.store.directory / "step_00000001", CPU)
    assert path is None


def test_no_checkpoint_is_made_of_counts(guarded: Guarded, make_state: MakeState) -> None:
    guarded.bad()
    guarded.good()
    guarded.state.save(guarded.store, guarded.cfg)
    again = make_state(guarded.cfg)
    again.restore(guarded.store.load())
    assert (again.step, again.skipped) == (2, 1)
