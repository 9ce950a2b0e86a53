"""One training step: what it changes, in which order, and that a broken one changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.train import step as step_module
from dinov2_equi.train.precision import autocast
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import NonFiniteLossError, train_step

MakeConfig = Callable[..., Config]
MakeState = Callable[[Config], TrainState]
MakeBatch = Callable[..., Batch]
Snapshot = Callable[[TrainState], dict[str, Tensor]]
Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]

CPU = torch.device("cpu")
LOSSES = {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "equi_loss"}
METRICS = {f"equi/{name}_step_{k}" for name in ("error", "psnr") for k in (1, 2)}
DIAGNOSTICS = {"equi/gradient_ratio", "equi/variance_share", "equi/rank_invariant", "equi/rank_equivariant"}
DIAGNOSTICS |= {f"collapse/{name}" for name in ("cls_std", "patch_std", "prototype_entropy", "prototype_information")}
PARTS = {"backbone", "feature_split", "dino_head", "equi_decoder"}


def norm_of(module: nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return math.sqrt(float(sum(squares)))


@pytest.fixture
def cfg(make_config: MakeConfig) -> Config:
    return make_config("train.centering=centering")


# ----------------------------------------------------------------------------------------------------- what a step does


def test_step_returns_every_figure_as_a_plain_number(
    make_config: MakeConfig, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues
) -> None:
    cfg = make_config("equi.projection_dim=40")
    scalars = train_step(make_state(cfg), make_batch(cfg), step_values, cfg, CPU)
    norms = {f"grad_norm/{part}" for part in PARTS}
    assert set(scalars) == LOSSES | METRICS | DIAGNOSTICS | {"total_loss"} | norms
    assert all(type(value) is float for value in scalars.values())


@pytest.mark.parametrize(("period", "diagnosed"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 1, 3]), (100, [0])])
def test_diagnostics_come_at_the_first_step_and_then_once_in_a_period(
    period: int,
    diagnosed: list[int],
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
) -> None:
    # After 2 and 4 finished steps for a period of 2: where the metrics of the same period are written.
    cfg = make_config(f"logging.diagnostics_every_steps={period}")
    state = make_state(cfg)
    logged = [train_step(state, make_batch(cfg), step_values, cfg, CPU) for _ in range(5)]
    assert [step for step, scalars in enumerate(logged) if set(scalars) >= DIAGNOSTICS] == diagnosed
    assert [step for step, scalars in enumerate(logged) if set(scalars) & DIAGNOSTICS] == diagnosed


def test_diagnostics_change_no_bit_of_what_is_learned(
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
) -> None:
    states = []
    for period in (0, 1):
        cfg = make_config(f"logging.diagnostics_every_steps={period}", "student.drop_path_rate=0.3")
        states.append(make_state(cfg))
        torch.manual_seed(0)
        for seed in range(3):
            train_step(states[-1], make_batch(cfg, seed=seed), step_values, cfg, CPU)
    assert_same_bits(*(snapshot(state) for state in states))


def test_step_advances_everything_that_learns(
    cfg: Config, make_state: MakeState, make_batch: MakeBatch, snapshot: Snapshot, step_values: StepValues
) -> None:
    state = make_state(cfg)
    train_step(state, make_batch(cfg), step_values, cfg, CPU)  # the optimiser has a state from here on
    before = snapshot(state)
    train_step(state, make_batch(cfg, seed=1), step_values, cfg, CPU)
    after = snapshot(state)
    assert state.step == 2
    assert before.keys() == after.keys()
    still = {name for name in after if torch.equal(before[name], after[name])}
    assert still == set()


def test_same_step_from_the_same_state_gives_the_same_bits(
    cfg: Config,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
) -> None:
    first, second = make_state(cfg), make_state(cfg)
    torch.manual_seed(0)
    scalars = train_step(first, make_batch(cfg), step_values, cfg, CPU)
    torch.manual_seed(0)
    assert train_step(second, make_batch(cfg), step_values, cfg, CPU) == scalars
    assert_same_bits(snapshot(first), snapshot(second))


def test_gradients_left_over_from_before_do_not_count(
    cfg: Config,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
) -> None:
    clean, dirty = make_state(cfg), make_state(cfg)
    for p in dirty.model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, math.nan)
    for state in (clean, dirty):
        torch.manual_seed(0)
        train_step(state, make_batch(cfg), step_values, cfg, CPU)
    assert_same_bits(snapshot(clean), snapshot(dirty))


def test_schedule_of_the_step_reaches_every_parameter_group(
    cfg: Config, make_state: MakeState, make_batch: MakeBatch
) -> None:
    state = make_state(cfg)
    values = StepValues(lr=0.25e-3, wd=0.3, momentum=0.5, teacher_temp=0.06, last_layer_lr=0.125e-3)
    train_step(state, make_batch(cfg), values, cfg, CPU)
    for group in state.optimizer.param_groups:
        lr = 0.125e-3 if group["is_last_layer"] else 0.25e-3
        assert group["lr"] == lr * group["lr_multiplier"]
        assert group["weight_decay"] == 0.3 * group["wd_multiplier"]


def test_frozen_last_layer_does_not_move(cfg: Config, make_state: MakeState, make_batch: MakeBatch) -> None:
    state = make_state(cfg)
    head: Any = state.model.student["dino_head"]
    frozen, free = head.last_layer.weight_v.detach().clone(), head.mlp[0].weight.detach().clone()
    values = StepValues(lr=1e-3, wd=0.04, momentum=0.9, teacher_temp=0.05, last_layer_lr=0.0)
    train_step(state, make_batch(cfg), values, cfg, CPU)
    assert torch.equal(head.last_layer.weight_v, frozen)
    assert not torch.equal(head.mlp[0].weight, free)


def test_temperature_of_the_step_reaches_the_teacher(cfg: Config, make_state: MakeState, make_batch: MakeBatch) -> None:
    def global_loss(teacher_temp: float) -> float:
        state = make_state(cfg)
        torch.manual_seed(0)
        values = StepValues(lr=0.0, wd=0.0, momentum=1.0, teacher_temp=teacher_temp, last_layer_lr=0.0)
        return train_step(state, make_batch(cfg), values, cfg, CPU)["dino_global_crops_loss"]

    assert global_loss(0.04) != global_loss(0.4)


def test_teacher_follows_the_student_of_after_the_step(
    cfg: Config, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues
) -> None:
    state = make_state(cfg)
    before = {name: p.clone() for name, p in state.model.teacher.named_parameters()}
    train_step(state, make_batch(cfg), step_values, cfg, CPU)
    student = dict(state.model.student.named_parameters())
    for name, p in state.model.teacher.named_parameters():
        expected = 0.9 * before[name] + (1 - 0.9) * student[name].detach()
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)  # one multiply-add in float32


def test_learning_rate_of_zero_leaves_the_student_as_it_is(
    cfg: Config, make_state: MakeState, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    state = make_state(cfg)
    before = {name: tensor.clone() for name, tensor in state.model.student.state_dict().items()}
    values = StepValues(lr=0.0, wd=0.4, momentum=0.9, teacher_temp=0.05, last_layer_lr=0.0)
    train_step(state, make_batch(cfg), values, cfg, CPU)
    assert_same_bits(before, dict(state.model.student.state_dict()))


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("limit", [0.01, 3.0])
def test_each_part_is_clipped_on_its_own_and_logged_before(
    limit: float, make_config: MakeConfig, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues
) -> None:
    unclipped: dict[str, tuple[float, float]] = {}  # part: (norm of what is left, norm that was logged)
    clipped: dict[str, tuple[float, float]] = {}
    for clip_grad, norms in ((0.0, unclipped), (limit, clipped)):
        cfg = make_config("equi.projection_dim=40", f"optim.clip_grad={clip_grad}")
        state = make_state(cfg)
        torch.manual_seed(0)
        scalars = train_step(state, make_batch(cfg), step_values, cfg, CPU)
        for part, module in state.model.trainable_modules():
            norms[part] = (norm_of(module), scalars[f"grad_norm/{part}"])
    assert set(clipped) == PARTS
    for part, (free_norm, logged) in unclipped.items():
        assert logged == pytest.approx(free_norm, rel=1e-5)  # float32 against float64 sums
        assert clipped[part][1] == logged
        assert clipped[part][0] == pytest.approx(min(free_norm, limit), rel=1e-3)  # torch adds 1e-6 to the norm
    assert max(norm for norm, _ in unclipped.values()) > limit


def test_part_that_no_loss_trains_has_no_norm(
    make_config: MakeConfig, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues
) -> None:
    cfg = make_config("ibot.separate_head=true", "ibot.loss_weight=0")
    scalars = train_step(make_state(cfg), make_batch(cfg), step_values, cfg, CPU)
    assert "grad_norm/ibot_head" not in scalars


# --------------------------------------------------------------------------------------------------- a step that breaks


def scale_loss(monkeypatch: pytest.MonkeyPatch, module: nn.Module, method: str, factor: float) -> None:
    """Multiply what a loss returns, so that value and gradient break together."""
    original = getattr(module, method)
    monkeypatch.setattr(module, method, lambda *args: original(*args) * factor)


def broken_step(
    state: TrainState, batch: Batch, values: StepValues, cfg: Config, snapshot: Snapshot, compare: Compare
) -> str:
    """Run a step that must fail and change nothing; return the message."""
    before = snapshot(state)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    with pytest.raises(NonFiniteLossError) as caught:
        train_step(state, batch, values, cfg, CPU)
    compare(before, snapshot(state))
    for group, expected in zip(state.optimizer.param_groups, groups, strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == expected
    return str(caught.value)


@pytest.fixture
def state(cfg: Config, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues) -> TrainState:
    """Return a run after two good steps: moments, centres and teacher are not what they started as."""
    state = make_state(cfg)
    for seed in range(2):
        train_step(state, make_batch(cfg, seed=seed), step_values, cfg, CPU)
    return state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("loss", "method", "term"),
    [
        ("koleo_loss", "forward", "koleo_loss"),
        ("ibot_patch_loss", "forward_masked", "ibot_loss"),
        ("dino_loss", "forward", "dino_local_crops_loss"),
    ],
)
def test_broken_loss_is_named_and_changes_nothing(
    loss: str,
    method: str,
    term: str,
    value: float,
    cfg: Config,
    state: TrainState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scale_loss(monkeypatch, getattr(state.model, loss), method, value)
    message = broken_step(state, make_batch(cfg), step_values, cfg, snapshot, assert_same_bits)
    assert "step 2, rank 0: " in message
    assert f"{term} = " in message
    assert "total_loss = " in message
    for other in LOSSES - {term, "dino_global_crops_loss"}:
        assert f"{other} = " not in message


def test_broken_reconstruction_is_named_and_changes_nothing(
    cfg: Config,
    state: TrainState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
) -> None:
    assert state.model.equi is not None
    assert isinstance(state.model.equi.objective, Reconstruction)
    state.model.equi.objective.decoder.register_forward_hook(lambda module, inputs, images: images * math.nan)
    message = broken_step(state, make_batch(cfg), step_values, cfg, snapshot, assert_same_bits)
    assert "equi_loss = nan" in message
    assert "dino_global_crops_loss" not in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["backbone", "dino_head", "equi_decoder"])
def test_broken_gradient_of_a_finite_loss_is_named_and_changes_nothing(
    part: str,
    value: float,
    cfg: Config,
    state: TrainState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
) -> None:
    parameter = next(dict(state.model.trainable_modules())[part].parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    message = broken_step(state, make_batch(cfg), step_values, cfg, snapshot, assert_same_bits)
    assert f"step 2: grad_norm/{part} = {value}" in message  # it alone


@pytest.mark.parametrize("clip_grad", [0, 3])
def test_broken_gradient_is_noticed_with_and_without_clipping(
    clip_grad: int,
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
) -> None:
    cfg = make_config(f"optim.clip_grad={clip_grad}")
    state = make_state(cfg)
    backbone: Any = state.model.student["backbone"]
    backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    assert "grad_norm/backbone" in broken_step(state, make_batch(cfg), step_values, cfg, snapshot, assert_same_bits)


@pytest.mark.parametrize("crops", ["global_crops", "local_crops"])
def test_broken_image_changes_nothing(
    crops: str,
    cfg: Config,
    state: TrainState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
) -> None:
    batch = make_batch(cfg)
    getattr(batch, crops)[0, 0, 0, 0] = math.nan
    message = broken_step(state, batch, step_values, cfg, snapshot, assert_same_bits)
    assert "dino_local_crops_loss = nan" in message


def test_broken_step_names_its_rank(
    cfg: Config, state: TrainState, make_batch: MakeBatch, step_values: StepValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on four ranks, of which the last two are at fault; figures are means over all, so that each rank sees NaN.
    monkeypatch.setattr(step_module, "gather_values", lambda mine, _: [False, False, True, mine])
    scale_loss(monkeypatch, state.model.koleo_loss, "forward", math.nan)
    with pytest.raises(NonFiniteLossError, match="step 2, rank 2 and 3: koleo_loss = nan"):
        train_step(state, make_batch(cfg), step_values, cfg, CPU)


def test_run_goes_on_after_a_broken_step_as_if_it_had_not_been(
    cfg: Config,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
    snapshot: Snapshot,
    assert_same_bits: Compare,
) -> None:
    states = [make_state(cfg), make_state(cfg)]
    bad = make_batch(cfg)
    bad.global_crops.fill_(math.nan)
    with pytest.raises(NonFiniteLossError):
        train_step(states[1], bad, step_values, cfg, CPU)
    for state in states:
        torch.manual_seed(0)
        train_step(state, make_batch(cfg), step_values, cfg, CPU)
    assert_same_bits(snapshot(states[0]), snapshot(states[1]))


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cpu", None),
        ("auto", "cuda", ("cuda", torch.bfloat16)),
        ("fp32", "cpu", None),
        ("fp32", "cuda", None),
        ("bf16", "cpu", ("cpu", torch.bfloat16)),
        ("bf16", "cuda", ("cuda", torch.bfloat16)),
    ],
)
def test_precision_follows_choice_and_device(
    choice: str,
    device: str,
    expected: tuple[str, torch.dtype] | None,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[Any] = []

    def recording(device_type: str, dtype: torch.dtype) -> nullcontext[None]:
        entered.append((device_type, dtype))
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", recording)
    with autocast(make_config(f"compute_precision.autocast={choice}"), torch.device(device)):
        pass
    assert entered == ([] if expected is None else [expected])


def test_bf16_computes_in_bf16_and_keeps_float32_weights(
    make_config: MakeConfig, make_state: MakeState, make_batch: MakeBatch, step_values: StepValues
) -> None:
    cfg = make_config("compute_precision.autocast=bf16")
    state = make_state(cfg)
    seen: list[torch.dtype] = []
    head = state.model.student["dino_head"]
    head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    train_step(state, make_batch(cfg), step_values, cfg, CPU)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in state.model.parameters() if p.grad is not None} == {torch.float32}
