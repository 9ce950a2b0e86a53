"""A run saved and restored goes on bit for bit; a folder with another run is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.train import state as state_module
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import ResumeError, TrainState, check_same_run, flat_config
from dinov2_equi.train.step import train_step

MakeConfig = Callable[..., Config]
MakeState = Callable[[Config], TrainState]
MakeBatch = Callable[..., Batch]
Snapshot = Callable[[TrainState], dict[str, Tensor]]
Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]

CPU = torch.device("cpu")
SETUPS = {
    "off": ("equi.family=null", "equi.loss_weight=0"),
    "control": ("equi.loss_weight=0",),
    "full": ("equi.projection_dim=40", "train.centering=centering"),
    "parts without gradient": ("ibot.separate_head=true", "ibot.loss_weight=0"),
    "up-convolutions": ("equi.decoder.type=upconv",),  # running means, and a counter
    "some patches": ("equi.decoder.patch_fraction=0.3", "equi.source_2=teacher", "equi.layer=1"),
}
each_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


# ----------------------------------------------------------------------------------------------------- save and restore


@each_setup
def test_restored_run_holds_the_same_bits(
    setup: tuple[str, ...],
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
    store: CheckpointStore,
) -> None:
    cfg = make_config(*setup)
    state = make_state(cfg)
    for seed in range(2):
        train_step(state, make_batch(cfg, seed=seed), step_values, cfg, CPU)
    state.seconds = 12.5
    random_state = torch.get_rng_state()
    state.save(store, cfg)
    other = make_state(make_config(*setup, "train.seed=99"))
    other.restore(store.load())
    assert (other.step, other.seconds) == (2, 12.5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_bits(snapshot(state), snapshot(other))


@each_setup
def test_restored_run_goes_on_as_the_one_that_never_stopped(
    setup: tuple[str, ...],
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
    store: CheckpointStore,
) -> None:
    cfg = make_config(*setup, "student.drop_path_rate=0.5")  # so that the random state counts

    def go_on(state: TrainState) -> list[dict[str, float]]:
        return [train_step(state, make_batch(cfg, seed=seed), step_values, cfg, CPU) for seed in (1, 2)]

    straight = make_state(cfg)
    train_step(straight, make_batch(cfg), step_values, cfg, CPU)
    straight.save(store, cfg)
    logged = go_on(straight)
    resumed = make_state(cfg)
    resumed.restore(store.load())
    assert go_on(resumed) == logged
    assert_same_bits(snapshot(straight), snapshot(resumed))


def test_training_on_does_not_reach_into_the_checkpoint(
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
    store: CheckpointStore,
) -> None:
    cfg = make_config()
    state = make_state(cfg)
    train_step(state, make_batch(cfg), step_values, cfg, CPU)
    state.save(store, cfg)
    checkpoint, untouched = store.load(), store.load()
    state.restore(checkpoint)
    train_step(state, make_batch(cfg), step_values, cfg, CPU)
    for part, tensors in untouched.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensors[part][name], tensor), f"{part}/{name}"


def test_run_that_has_not_begun_can_be_saved(
    make_config: MakeConfig,
    make_state: MakeState,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    store: CheckpointStore,
) -> None:
    cfg = make_config()
    state = make_state(cfg)
    state.save(store, cfg)
    other = make_state(make_config("train.seed=99"))
    other.restore(store.load())
    assert other.step == 0
    assert_same_bits(snapshot(state), snapshot(other))


def test_random_state_of_a_missing_device_is_left_aside(
    make_config: MakeConfig, make_state: MakeState, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config()
    state = make_state(cfg)
    state.save(store, cfg)
    checkpoint = store.load()
    checkpoint.tensors["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state.restore(checkpoint)
    assert torch.equal(torch.get_rng_state(), checkpoint.tensors["rng"]["cpu"])


def test_checkpoint_of_another_model_is_refused_with_the_differences(
    make_config: MakeConfig,
    make_state: MakeState,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    store: CheckpointStore,
) -> None:
    off = make_config(*SETUPS["off"])
    make_state(off).save(store, off)
    state = make_state(make_config())
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"missing: equi\.objective\.decoder\.") as caught:
        state.restore(store.load())
    assert "of another shape: " in str(caught.value)  # the heads are narrower with the branch on
    assert_same_bits(before, snapshot(state))


def without_set(name: str) -> Any:
    return lambda checkpoint: checkpoint.tensors.pop(name)


def with_state(**values: Any) -> Any:
    return lambda checkpoint: checkpoint.state.update(values)


def other_dtype(checkpoint: Checkpoint) -> None:
    model = checkpoint.tensors["model"]
    name = "student.backbone.cls_token"
    model[name] = model[name].double()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_set("model"), CheckpointError, "missing or of another type are model.safetensors"),
        (without_set("rng"), CheckpointError, "missing or of another type are rng.safetensors"),
        (with_state(optimizer=[]), CheckpointError, "another type are optimizer"),
        (with_state(seconds=None), CheckpointError, "another type are seconds"),
        (with_state(skipped="3"), CheckpointError, "another type are skipped"),
        (other_dtype, ValueError, "expected torch.float32 for student.backbone.cls_token.*holds torch.float64"),
    ],
)
def test_an_undamaged_checkpoint_of_something_else_ends_in_a_traceback_or_is_taken(
    change: Any,
    error: type[Exception],
    message: str,
    make_config: MakeConfig,
    make_state: MakeState,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    store: CheckpointStore,
) -> None:
    cfg = make_config()
    state = make_state(cfg)
    state.save(store, cfg)
    before = snapshot(state)
    checkpoint = store.load()
    change(checkpoint)
    with pytest.raises(error, match=message):
        state.restore(checkpoint)
    assert_same_bits(before, snapshot(state))


@pytest.mark.parametrize("cpu", [None, torch.zeros(8, dtype=torch.uint8), torch.zeros(5056)])
def test_a_random_state_of_something_else_ends_in_a_traceback(cpu: Tensor | None) -> None:
    with pytest.raises(ValueError, match="random state 'cpu' of the checkpoint is none of this PyTorch"):
        state_module.set_random_state({} if cpu is None else {"cpu": cpu})


# --------------------------------------------------------------------------------------------------------- the same run


def checkpoint_of(cfg: Config) -> Checkpoint:
    """Return a checkpoint as it comes back from the disk, without tensors."""
    return Checkpoint(step=7, tensors={}, state=json.loads(json.dumps({"config": flat_config(cfg)})), path=Path())


def test_flat_config_has_every_key_with_its_plain_value(make_config: MakeConfig) -> None:
    cfg = make_config("equi.decoder.depth=1", "crops.global_crops_scale=[0.4,1]")
    flat = flat_config(cfg)
    assert set(flat) == set(leaf_types())
    assert flat["equi.decoder.depth"] == 1
    assert flat["crops.global_crops_scale"] == [0.4, 1.0]
    assert flat["equi.dim"] is None
    assert json.loads(json.dumps(flat)) == flat


def test_same_settings_pass_without_a_word(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    check_same_run(checkpoint_of(make_config()), make_config())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("student.arch", "vit_test_tiny", "vit_tiny"),
        ("student.patch_size", "8", "16"),
        ("student.drop_path_rate", "0.1", "0.2"),
        ("dino.head_n_prototypes", "64", "32"),
        ("dino.koleo_loss_weight", "0.1", "0.0"),
        ("ibot.separate_head", "False", "True"),
        ("vicreg.covariance_weight", "1.0", "2.0"),
        ("ibot.mask_ratio_min_max", "[0.1, 0.5]", "[0.2, 0.5]"),
        ("equi.family", "se2", "rotation"),
        ("equi.loss_weight", "1.0", "2.0"),
        ("equi.num_steps", "2", "3"),
        ("equi.dim", "None", "8"),
        ("equi.fill", "reflect", "zeros"),
        ("equi.decoder.depth", "2", "1"),
        ("equi.decoder.type", "transformer", "upconv"),
        ("equi.target", "path", "view_2"),
        ("equi.layer", "last", "1"),
        ("equi.source_2", "student", "teacher"),
        ("crops.local_crops_number", "2", "3"),
        ("crops.blur", "intended", "dinov2_released"),
        ("data.mean", "[0.485, 0.456, 0.406]", "[0.5, 0.5, 0.5]"),
        ("data.holdout_fraction", "0.25", "0.5"),
        ("train.dataset_path", "synthetic:length=64:size=96x128", "synthetic:length=65:size=96x128"),
        ("train.seed", "0", "1"),
        ("train.centering", "centering", "sinkhorn_knopp"),
    ],
)
def test_changed_identity_is_refused_with_both_values(key: str, before: str, now: str, make_config: MakeConfig) -> None:
    with pytest.raises(ResumeError) as caught:
        check_same_run(checkpoint_of(make_config()), make_config(f"{key}={now}"))
    message = str(caught.value)
    # Text is shown in quotes, everything else as it is.
    assert f"({key}: was {before}, now {now})" in message.replace("'", "")
    assert "step 7" in message
    assert "--no-resume" in message


IMAGES = "batch_size_per_gpu x train.gradient_accumulation_steps x processes"


def test_a_run_goes_on_with_fewer_images_in_a_step(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = checkpoint_of(make_config())  # 4 images on one process
    with pytest.raises(ResumeError, match=f"{IMAGES}: was 4, now 2"):
        check_same_run(begun, make_config("train.batch_size_per_gpu=2"))
    monkeypatch.setattr(state_module, "get_world_size", lambda: 2)
    check_same_run(begun, make_config("train.batch_size_per_gpu=2"))
    check_same_run(begun, make_config("train.batch_size_per_gpu=1", "train.gradient_accumulation_steps=2"))
    with pytest.raises(ResumeError, match=f"{IMAGES}: was 4, now 8"):
        check_same_run(begun, make_config())


def test_all_changes_are_listed_at_once(make_config: MakeConfig) -> None:
    with pytest.raises(ResumeError) as caught:
        check_same_run(checkpoint_of(make_config()), make_config("equi.num_steps=3", "train.seed=4", "optim.epochs=3"))
    assert "equi.num_steps: was 2, now 3" in str(caught.value)
    assert "train.seed: was 0, now 4" in str(caught.value)
    assert "optim.epochs" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.num_workers=3",
        "train.num_threads=2",
        "train.output_dir=elsewhere",
        "train.checkpoint_every_steps=5",
        "train.checkpoint_keep=1",
        "logging.metrics_every_steps=10",
        "logging.diagnostics_every_steps=5",
        "logging.tensorboard=false",
        "logging.pictures_every_steps=5",
        "logging.report=false",
        "evaluation.probe=false",
        "evaluation.batch_size=8",
        "evaluation.eval_period_iterations=5",
    ],
)
def test_settings_that_do_not_change_what_is_learned_may_differ(
    override: str, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    check_same_run(checkpoint_of(make_config()), make_config(override))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("optim.epochs", "2", "4"),
        ("optim.base_lr", "0.004", "0.001"),
        ("optim.clip_grad", "3.0", "1.0"),
        ("teacher.teacher_temp", "0.07", "0.06"),
        ("teacher.momentum_teacher", "0.992", "0.9"),
        ("train.OFFICIAL_EPOCH_LENGTH", "10", "20"),
    ],
)
def test_changed_schedule_is_taken_with_a_warning(
    key: str, before: str, now: str, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_same_run(checkpoint_of(make_config()), make_config(f"{key}={now}"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    text = caplog.text.replace("'", "")
    assert f"{key} = {now}" in text
    assert f"used {before}" in text


@pytest.mark.parametrize("config", [None, "x", {"train.batch_size_per_gpu": {}}], ids=str)
def test_settings_of_something_else_end_in_a_traceback(config: Any, make_config: MakeConfig) -> None:
    checkpoint = checkpoint_of(make_config())
    checkpoint.state["config"] = config
    with pytest.raises(CheckpointError, match="no checkpoint of a training run: missing or of another type are"):
        check_same_run(checkpoint, make_config())


def test_a_key_younger_than_the_checkpoint_makes_it_another_run(make_config: MakeConfig) -> None:
    checkpoint = checkpoint_of(make_config())
    del checkpoint.state["config"]["crops.gray_prob"]
    check_same_run(checkpoint, make_config())
    with pytest.raises(ResumeError, match=r"crops\.gray_prob: was 0\.2, now 0\.5"):
        check_same_run(checkpoint, make_config("crops.gray_prob=0.5"))
