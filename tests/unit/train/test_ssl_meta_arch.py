"""The meta-architecture: DINOv2 with the branch off, no extra encoder pass with it on, gradients where they belong."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi import equi
from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.transforms import normalize
from dinov2_equi.equi.families.base import FamilySettings, RangedFamily
from dinov2_equi.equi.families.registry import FAMILIES, build_family
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.sampling import draw_theta
from dinov2_equi.equi.tokens import EquiTokens
from dinov2_equi.train import build_model, ssl_meta_arch
from dinov2_equi.train.outputs import StepOutput
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import train_step

MakeConfig = Callable[..., Config]
MakeState = Callable[[Config], TrainState]
MakeBatch = Callable[..., Batch]
Snapshot = Callable[[TrainState], dict[str, Tensor]]
Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]

CPU = torch.device("cpu")
WIDTH, EQUI_DIM = 48, 12  # vit_test_tiny, and a quarter of it
OFF = ("equi.family=null", "equi.loss_weight=0")
CONTROL = ("equi.family=se2", "equi.loss_weight=0")
FULL = ("equi.family=se2", "equi.loss_weight=1")
EQUI_ONLY = (*FULL, "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0")
VICREG = ("vicreg.loss_weight=1", "vicreg.expander_dim=32")
VICREG_ONLY = (*VICREG, "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0")
NO_DROP = "student.drop_path_rate=0"

each_setup = pytest.mark.parametrize("setup", [OFF, CONTROL, FULL], ids=["off", "control", "full"])


def build(cfg: Config) -> SSLMetaArch:
    torch.manual_seed(cfg.train.seed)
    return SSLMetaArch(cfg).train()


def run_step(model: SSLMetaArch, batch: Batch, teacher_temp: float = 0.05) -> StepOutput:
    torch.manual_seed(17)  # the same images skip the same blocks
    model.zero_grad(set_to_none=True)
    return model.forward_backward(batch, teacher_temp=teacher_temp)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def backbone_of(network: nn.Module) -> Any:
    assert isinstance(network, nn.ModuleDict)
    return network["backbone"]


class Recorder:
    """Records the images and masks that a backbone is given, call by call."""

    def __init__(self, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[Tensor], list[Tensor | None]]] = []
        original = backbone.forward_features

        def recording(x: Any, masks: Any = None, **wanted: Any) -> Any:
            crops = [x] if isinstance(x, Tensor) else list(x)
            self.calls.append((crops, masks if isinstance(masks, list) else [masks] * len(crops)))
            return original(x, masks, **wanted)

        monkeypatch.setattr(backbone, "forward_features", recording)

    @property
    def shapes(self) -> list[list[torch.Size]]:
        return [[crop.shape for crop in crops] for crops, _ in self.calls]


# ------------------------------------------------------------------------------------------------- branch off is DINOv2


def three_steps(
    cfg: Config, make_state: MakeState, make_batch: MakeBatch, snapshot: Snapshot, values: StepValues
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    state = make_state(cfg)
    logged = [train_step(state, make_batch(cfg, seed=step), values, cfg, CPU) for step in range(3)]
    return snapshot(state), logged


ABSENT_BRANCH = (
    "equi.num_steps=5",
    "equi.include_final=true",
    "equi.target=masked",
    "equi.layer=1",
    "equi.source_2=teacher",
    "equi.only_unmasked=true",
    "equi.dim=7",
    "equi.projection_dim=20",
    "equi.use_cls=true",
    "equi.fill=zeros",
    "equi.max_rotation_deg=180",
    "equi.max_translation_px=3",
    "equi.max_brightness=0.1",
    "equi.max_contrast=0.1",
    "equi.max_saturation=0.4",
    "equi.max_hue=0.5",
    "equi.blur_sigma_px=[1,3]",
    "equi.max_zoom=2",
    "equi.max_corner_px=40",
    "equi.mixture=[]",
    "equi.decoder.type=upconv",
    "equi.decoder.depth=1",
    "equi.decoder.width=96",
    "equi.decoder.num_heads=2",
    "equi.decoder.mlp_ratio=2",
    "equi.decoder.shared=false",
    "equi.decoder.patch_fraction=0.5",
    "equi.decoder.half_resolution=true",
)
SWITCHES = {"equi.family", "equi.loss_weight", "equi.split_without_transform"}


def test_a_setting_of_the_branch_is_not_tried_while_it_is_off() -> None:
    tried = {setting.partition("=")[0] for setting in ABSENT_BRANCH}
    assert {key for key in leaf_types() if key.startswith("equi.")} == tried | SWITCHES


def test_settings_of_a_branch_that_is_off_change_no_bit_in_three_steps(
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
) -> None:
    plain = three_steps(make_config(*OFF), make_state, make_batch, snapshot, step_values)
    other = three_steps(make_config(*OFF, *ABSENT_BRANCH), make_state, make_batch, snapshot, step_values)
    assert_same_bits(plain[0], other[0])
    assert plain[1] == other[1]


def everything_in_equi() -> Iterator[tuple[Any, str]]:
    """Yield each function, and the constructor of each class, that the package `equi` defines."""
    for info in pkgutil.walk_packages(equi.__path__, "dinov2_equi.equi."):
        module = importlib.import_module(info.name)
        for name, item in vars(module).items():
            if getattr(item, "__module__", "") == module.__name__ and callable(item):
                yield (item, "__init__") if isinstance(item, type) else (module, name)


def test_run_with_the_branch_off_does_not_touch_its_code_and_loses_no_bit(
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    snapshot: Snapshot,
    assert_same_bits: Compare,
    step_values: StepValues,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = make_config(*OFF)
    plain = three_steps(cfg, make_state, make_batch, snapshot, step_values)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the branch is off and was called")

    for owner, name in everything_in_equi():
        monkeypatch.setattr(owner, name, refuse)
    for name in ("EquivarianceBranch", "Reconstruction", "FeatureSplit", "FamilySettings", "build_family"):
        monkeypatch.setattr(build_model, name, refuse)  # bound there by import
    monkeypatch.setattr(ssl_meta_arch, "EquiTokens", refuse)
    with pytest.raises(AssertionError, match="was called"):
        build(make_config(*CONTROL))  # the traps do work
    without = three_steps(cfg, make_state, make_batch, snapshot, step_values)
    assert_same_bits(plain[0], without[0])
    assert plain[1] == without[1]


def test_model_with_the_branch_off_has_the_parts_of_dinov2_only(make_config: MakeConfig) -> None:
    model = build(make_config(*OFF))
    assert model.equi is None
    assert list(model.student) == list(model.teacher) == ["backbone", "dino_head"]
    assert not any("equi" in name or "split" in name for name in model.state_dict())


def test_losses_with_the_branch_off_are_those_of_dinov2(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*OFF)
    output = run_step(build(cfg), make_batch(cfg))
    names = {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "total_loss"}
    assert set(output.losses) == names
    assert output.metrics == {}


# ----------------------------------------------------------------------------------------- the control run is a control


def test_control_and_full_run_start_from_the_same_networks(make_config: MakeConfig, assert_same_bits: Compare) -> None:
    control = build(make_config(*CONTROL))
    after_control = torch.get_rng_state()
    full = build(make_config(*FULL))
    assert torch.equal(torch.get_rng_state(), after_control)  # the decoder's weights took nothing from the stream
    assert_same_bits(dict(control.student.state_dict()), dict(full.student.state_dict()))
    assert_same_bits(dict(control.teacher.state_dict()), dict(full.teacher.state_dict()))
    assert control.equi is not None
    assert control.equi.objective is None
    assert full.equi is not None
    assert full.equi.objective is not None


@pytest.mark.parametrize("projection", [(), ("equi.projection_dim=40",)], ids=["slice", "projection"])
def test_all_setups_start_from_the_same_backbone(
    projection: tuple[str, ...], make_config: MakeConfig, assert_same_bits: Compare
) -> None:
    off, control, full = (
        dict(backbone_of(build(make_config(*setup, *projection)).student).state_dict())
        for setup in (OFF, CONTROL, FULL)
    )
    assert_same_bits(off, control)
    assert_same_bits(off, full)


def test_control_and_full_run_see_the_same_views_and_drop_the_same_paths(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, random_states, losses = [], [], []
    for setup in (CONTROL, FULL):
        cfg = make_config(*setup, "student.drop_path_rate=0.5")
        model = build(cfg)
        recorder = Recorder(backbone_of(model.student), monkeypatch)
        losses.append(run_step(model, make_batch(cfg)).losses)
        seen.append(recorder.calls[0])
        random_states.append(torch.get_rng_state())
    (crops_1, masks_1), (crops_2, masks_2) = seen
    assert all(torch.equal(a, b) for a, b in zip(crops_1, crops_2, strict=True))
    assert masks_1[0] is not None
    assert masks_2[0] is not None
    assert torch.equal(masks_1[0], masks_2[0])
    assert torch.equal(*random_states)
    for name in ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"):
        assert torch.equal(losses[0][name], losses[1][name])


def test_control_run_computes_no_reconstruction(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*CONTROL)
    output = run_step(build(cfg), make_batch(cfg))
    assert "equi_loss" not in output.losses
    assert output.metrics == {}


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.mark.parametrize("setup", [CONTROL, FULL], ids=["control", "full"])
def test_both_networks_see_crop_1_as_it_is_and_crop_2_transformed(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*setup, "train.seed=5")
    model, batch = build(cfg), make_batch(cfg)
    student = Recorder(backbone_of(model.student), monkeypatch)
    teacher = Recorder(backbone_of(model.teacher), monkeypatch)
    run_step(model, batch)
    crops_1, crops_2 = batch.global_crops.chunk(2)
    family = build_family("se2")
    view_2 = family.apply(crops_2, draw_theta(family, batch.positions, seed=5))
    expected = normalize(torch.cat([crops_1, view_2]), cfg.data.mean, cfg.data.std)
    for crops in (student.calls[0][0][0], teacher.calls[0][0][0]):
        assert torch.equal(crops, expected)
    assert torch.equal(student.calls[0][0][1], normalize(batch.local_crops, cfg.data.mean, cfg.data.std))


def test_networks_see_the_plain_crops_with_the_branch_off(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*OFF)
    model, batch = build(cfg), make_batch(cfg)
    student = Recorder(backbone_of(model.student), monkeypatch)
    run_step(model, batch)
    assert torch.equal(student.calls[0][0][0], normalize(batch.global_crops, cfg.data.mean, cfg.data.std))


def test_student_is_masked_and_teacher_is_not(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*FULL)
    model, batch = build(cfg), make_batch(cfg)
    student = Recorder(backbone_of(model.student), monkeypatch)
    teacher = Recorder(backbone_of(model.teacher), monkeypatch)
    run_step(model, batch)
    on_global, on_local = student.calls[0][1]
    assert on_global is not None
    assert torch.equal(on_global, batch.masks)
    assert on_local is None
    assert teacher.calls[0][1] == [None]


def test_batch_is_not_written_to(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL)
    batch, untouched = make_batch(cfg), make_batch(cfg)
    run_step(build(cfg), batch)
    for name, tensor in batch.tensors().items():
        assert torch.equal(tensor, untouched.tensors()[name])


# ------------------------------------------------------------------------------------------------ no extra encoder pass


def test_the_branch_costs_no_encoder_pass_and_no_image(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {}
    for setup in (OFF, CONTROL, FULL):
        cfg = make_config(*setup)
        model = build(cfg)
        student = Recorder(backbone_of(model.student), monkeypatch)
        teacher = Recorder(backbone_of(model.teacher), monkeypatch)
        run_step(model, make_batch(cfg))
        shapes[setup] = (student.shapes, teacher.shapes)
    global_crops, local_crops = (8, 3, 32, 32), (8, 3, 16, 16)  # 2 global and 2 local crops of 4 images
    assert shapes[OFF] == ([[global_crops, local_crops]], [[global_crops]])
    assert shapes[CONTROL] == shapes[OFF]
    assert shapes[FULL] == shapes[OFF]


# ------------------------------------------------------------------------------------------------------------ gradients


def backbone_gradient_through(
    views_kept: tuple[bool, bool], cfg: Config, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Tensor]:
    """Return gradients of the backbone, and the loss, where the tokens of some views are cut from the graph."""
    model = build(cfg)
    original = model._equivariant_tokens

    def cut(network: nn.ModuleDict, features: Any) -> tuple[EquiTokens, EquiTokens]:
        first, second = (
            t if kept else EquiTokens(t.patches.detach(), None if t.cls is None else t.cls.detach())
            for t, kept in zip(original(network, features), views_kept, strict=True)
        )
        return first, second

    monkeypatch.setattr(model, "_equivariant_tokens", cut)
    output = run_step(model, make_batch(cfg))
    return gradients(backbone_of(model.student)), output.losses["equi_loss"]


@pytest.mark.parametrize("extra", [(), ("equi.projection_dim=40",), ("equi.use_cls=true",)])
def test_reconstruction_trains_the_backbone_through_both_views(
    extra: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*EQUI_ONLY, *extra, NO_DROP)
    both, loss_both = backbone_gradient_through((True, True), cfg, make_batch, monkeypatch)
    first, loss_first = backbone_gradient_through((True, False), cfg, make_batch, monkeypatch)
    second, _ = backbone_gradient_through((False, True), cfg, make_batch, monkeypatch)
    assert torch.equal(loss_both, loss_first)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"):
        assert first[name].norm() > 1e-3 * both[name].norm() > 0
        assert second[name].norm() > 1e-3 * both[name].norm()
    for name, gradient in both.items():
        # The graph is the same, so the two paths add up; float32 sums in another order.
        error = (first[name] + second[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-9, name


def test_reconstruction_without_either_view_does_not_reach_the_backbone(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*EQUI_ONLY, NO_DROP)
    neither, _ = backbone_gradient_through((False, False), cfg, make_batch, monkeypatch)
    assert not any(gradient.any() for gradient in neither.values())  # so that the tests above count what they say


def test_reconstruction_moves_the_equivariant_channels_and_no_head(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*EQUI_ONLY)
    model = build(cfg)
    run_step(model, make_batch(cfg))
    gradient = grad_of(backbone_of(model.student).norm.weight)  # the last thing before the split
    assert not gradient[:-EQUI_DIM].any()
    assert gradient[-EQUI_DIM:].all()
    assert not any(g.any() for g in gradients(model.student["dino_head"]).values())


def test_ssl_losses_move_the_invariant_channels_only(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*CONTROL)
    model = build(cfg)
    run_step(model, make_batch(cfg))
    gradient = grad_of(backbone_of(model.student).norm.weight)
    assert gradient[:-EQUI_DIM].all()
    assert not gradient[-EQUI_DIM:].any()


def test_heads_are_as_wide_as_the_invariant_part(make_config: MakeConfig) -> None:
    def width(*overrides: str) -> int:
        head: Any = build(make_config(*overrides)).student["dino_head"]
        return int(head.mlp[0].weight.shape[1])

    assert width(*OFF) == WIDTH
    assert width(*FULL) == width(*CONTROL) == WIDTH - EQUI_DIM
    assert width(*FULL, "equi.dim=5") == WIDTH - 5
    assert width(*FULL, "equi.projection_dim=40") == 30  # a quarter of 40 is equivariant
    assert width(*FULL, "equi.projection_dim=40", "equi.dim=7") == 33


@pytest.mark.parametrize("extra", [(), ("equi.projection_dim=40",), ("ibot.separate_head=true",)])
def test_every_trained_parameter_gets_a_gradient(
    extra: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*FULL, *extra)
    model = build(cfg)
    run_step(model, make_batch(cfg))
    for part, module in model.trainable_modules():
        silent = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == [], part


@each_setup
def test_teacher_gets_no_gradient_and_does_not_move(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    cfg = make_config(*setup)
    model = build(cfg)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    run_step(model, make_batch(cfg))
    assert all(not p.requires_grad and p.grad is None for p in model.teacher.parameters())
    assert_same_bits(before, dict(model.teacher.state_dict()))


def test_optimiser_holds_each_trained_parameter_once_and_no_teacher(
    make_config: MakeConfig, make_state: MakeState
) -> None:
    state = make_state(make_config(*FULL, "equi.projection_dim=40", "ibot.separate_head=true"))
    model = state.model
    assert model.equi is not None
    held = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    expected = [id(p) for module in (model.student, model.equi) for p in module.parameters()]
    assert sorted(held) == sorted(expected)
    parts = [name for name, _ in model.trainable_modules()]
    assert sorted(parts) == ["backbone", "dino_head", "equi_decoder", "feature_split", "ibot_head"]


# --------------------------------------------------------------------------------------------------- the optimised loss

WEIGHTS = ("dino.loss_weight=0.7", "dino.koleo_loss_weight=0.3", "ibot.loss_weight=1.3", "equi.loss_weight=2.5")


def test_logged_total_is_the_weighted_sum_and_the_loss_that_is_optimised(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised: list[Tensor] = []
    original: Any = Tensor.backward

    def recording(self: Tensor, *args: Any, **kwargs: Any) -> None:
        optimised.append(self.detach().clone())
        original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "backward", recording)
    cfg = make_config(*FULL, *WEIGHTS, *VICREG, "vicreg.loss_weight=1.5", "vicreg.covariance_weight=3")
    logged = run_step(build(cfg), make_batch(cfg)).losses
    # KoLeo is logged with its weight, as in DINOv2; KoLeo and iBOT are logged as the mean of the two global crops.
    expected = (
        0.7 * (logged["dino_local_crops_loss"] + logged["dino_global_crops_loss"])
        + 2 * logged["koleo_loss"]
        + 2 * 1.3 * logged["ibot_loss"]
        + 2.5 * logged["equi_loss"]
        + 1.5 * (10 * (logged["vicreg_invariance_loss"] + logged["vicreg_variance_loss"]))
        + 1.5 * 3 * logged["vicreg_covariance_loss"]
    )
    assert len(optimised) == 1
    assert torch.equal(logged["total_loss"], optimised[0])
    torch.testing.assert_close(logged["total_loss"], expected, rtol=1e-6, atol=0)
    assert not any(value.requires_grad for value in logged.values())


ONE_TERM = {
    "all": WEIGHTS,
    "DINO": ("dino.koleo_loss_weight=0", "ibot.loss_weight=0", "equi.loss_weight=0"),
    "KoLeo": ("dino.koleo_loss_weight=1", "dino.loss_weight=0", "ibot.loss_weight=0", "equi.loss_weight=0"),
    "iBOT": ("dino.koleo_loss_weight=0", "dino.loss_weight=0", "equi.loss_weight=0"),
    "VICReg": (*VICREG_ONLY, "equi.loss_weight=0"),
    "reconstruction": EQUI_ONLY,
}


@pytest.mark.parametrize("weights", ONE_TERM.values(), ids=ONE_TERM.keys())
def test_logged_total_changes_along_the_gradient_as_fast_as_the_gradient_says(
    weights: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    # LayerScale would make all fresh features equal, and KoLeo gives no gradient to equal features.
    cfg = make_config(*FULL, *weights, NO_DROP, "student.layerscale=0", "equi.use_cls=true")
    model, batch = build(cfg), make_batch(cfg)
    total = run_step(model, batch).losses["total_loss"].item()
    parameters = [p for _, module in model.trainable_modules() for p in module.parameters() if p.grad is not None]
    start = [p.detach().clone() for p in parameters]
    gradient = [grad_of(p).clone() for p in parameters]
    squared_norm = sum(float(g.double().square().sum()) for g in gradient)

    def total_at(distance: float) -> float:
        with torch.no_grad():
            for p, origin, g in zip(parameters, start, gradient, strict=True):
                p.copy_(origin + distance * g)
        return run_step(model, batch).losses["total_loss"].item()

    h = 5e-4 * total / squared_norm  # moves the total by a two-thousandth: so short a way is straight
    change = total_at(h) - total_at(-h)
    assert change == pytest.approx(1e-3 * total, rel=0.01)  # float32 knows each total to 1e-6 of it


def cross_entropy(target: Tensor, logits: Tensor) -> float:
    """Return that of one row of logits [K] at the student's temperature, in float64."""
    return -float((target.double() * (logits.double() / 0.1).log_softmax(dim=0)).sum())


@pytest.mark.parametrize("extra", [OFF, CONTROL, (*FULL, "equi.projection_dim=40")], ids=["off", "slice", "projection"])
@torch.no_grad()
def test_ssl_losses_equal_plain_loops_over_crops_and_masked_patches(
    extra: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LayerScale would make all fresh features equal, and a swap of crops would not show.
    cfg = make_config(*extra, NO_DROP, "student.layerscale=0", "train.centering=centering", "ibot.separate_head=true")
    model, batch = build(cfg), make_batch(cfg)
    student: Any = model.student
    for p in model.teacher.parameters():
        p.mul_(1.5)  # another network than the student
    recorder = Recorder(student["backbone"], monkeypatch)
    with torch.enable_grad():
        logged = run_step(model, batch, teacher_temp=0.07).losses
    (global_crops, local_crops), masks = recorder.calls[0]
    B, L, G = 4, 2, 2

    def invariant(network: Any, tokens: Tensor) -> Tensor:
        return network["feature_split"].invariant(tokens) if "feature_split" in network else tokens

    def heads(network: Any, crops: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        features = network["backbone"](crops, masks=mask, is_training=True)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        return network["dino_head"](invariant(network, cls)), network["ibot_head"](invariant(network, patches))

    cls, patches = heads(student, global_crops, masks[0])
    cls_local, _ = heads(student, local_crops, None)
    teacher_cls, teacher_patches = ((logits / 0.07).softmax(-1) for logits in heads(model.teacher, global_crops, None))
    between_global = [cross_entropy(teacher_cls[(1 - g) * B + b], cls[g * B + b]) for g in range(G) for b in range(B)]
    to_local = [
        cross_entropy(teacher_cls[g * B + b], cls_local[crop * B + b])
        for crop in range(L)
        for g in range(G)
        for b in range(B)
    ]
    ibot = 0.0
    for image, n in batch.masks.nonzero().tolist():
        ibot += cross_entropy(teacher_patches[image, n], patches[image, n]) / int(batch.masks[image].sum())
    pairs = G * L + G
    # Float32 against float64; the packed pass sums in another order, and 1 / 0.07 magnifies the difference.
    assert logged["dino_global_crops_loss"].item() == pytest.approx(sum(between_global) / B / pairs, rel=1e-4)
    assert logged["dino_local_crops_loss"].item() == pytest.approx(sum(to_local) / B / pairs, rel=1e-4)
    assert logged["ibot_loss"].item() == pytest.approx(ibot / (G * B) / 2, rel=1e-4)


def test_weight_of_the_branch_scales_its_gradient_and_not_its_logged_loss(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    outputs, decoder_gradients = [], []
    for weight in (1, 4):
        cfg = make_config(*FULL, f"equi.loss_weight={weight}")
        model = build(cfg)
        outputs.append(run_step(model, make_batch(cfg)))
        assert model.equi is not None
        decoder_gradients.append(gradients(model.equi))
    assert torch.equal(outputs[0].losses["equi_loss"], outputs[1].losses["equi_loss"])
    for name, gradient in decoder_gradients[0].items():
        assert torch.equal(4 * gradient, decoder_gradients[1][name])  # a power of two changes no digit


def test_logged_reconstruction_loss_is_that_of_the_targets_at_the_path_points(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*FULL)
    model, batch = build(cfg), make_batch(cfg)
    drawn: list[Tensor] = []
    assert model.equi is not None
    assert isinstance(model.equi.objective, Reconstruction)
    model.equi.objective.decoder.register_forward_hook(lambda module, inputs, images: drawn.append(images.detach()))
    output = run_step(model, batch)
    family = build_family("se2")
    theta, crops = draw_theta(family, batch.positions, cfg.train.seed), batch.global_crops.chunk(2)[1]
    errors = [
        (drawn[0][k] - family.apply(crops, theta * ((k + 1) / 3))).double().square().mean().item() for k in range(2)
    ]
    assert output.losses["equi_loss"].item() == pytest.approx(sum(errors) / 2, rel=1e-5)  # float32 sums
    assert output.metrics["equi/error_step_1"].item() == pytest.approx(errors[0], rel=1e-5)
    assert output.metrics["equi/error_step_2"].item() == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("use_cls", [False, True])
def test_decoder_gets_the_class_tokens_only_on_request(
    use_cls: bool, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*FULL, f"equi.use_cls={str(use_cls).lower()}")
    model = build(cfg)
    received: list[tuple[Any, ...]] = []
    assert model.equi is not None
    assert isinstance(model.equi.objective, Reconstruction)
    model.equi.objective.decoder.register_forward_pre_hook(lambda module, args: received.append(args))
    run_step(model, make_batch(cfg))
    tokens_1, tokens_2, grid, cls = received[0]
    assert tokens_1.shape == tokens_2.shape == (4, 16, EQUI_DIM)
    assert grid == (4, 4)
    if use_cls:
        assert [tuple(c.shape) for c in cls] == [(4, EQUI_DIM)] * 2
    else:
        assert cls is None


# ----------------------------------------------------------------------------------------------------- teacher, centres


@pytest.mark.parametrize("momentum", [0.0, 0.6, 1.0])
def test_teacher_follows_the_student_in_every_part(
    momentum: float, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*FULL, "equi.projection_dim=40")
    model = build(cfg)
    output = run_step(model, make_batch(cfg))
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(0.1)
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    model.update_teacher(output, momentum)
    student = dict(model.student.named_parameters())
    assert any(name.startswith("feature_split.") for name in before)
    for name, p in model.teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * student[name]
        torch.testing.assert_close(p, expected.detach(), rtol=1e-6, atol=1e-7)  # one multiply-add in float32


def test_centres_move_with_update_teacher_and_not_before(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL, "train.centering=centering")
    model = build(cfg)
    output = run_step(model, make_batch(cfg))
    assert not model.dino_loss.center.any()
    assert not model.ibot_patch_loss.center.any()
    model.update_teacher(output, 0.9)
    assert output.teacher.ibot_mean is not None
    torch.testing.assert_close(model.dino_loss.center, 0.1 * output.teacher.dino_mean, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(model.ibot_patch_loss.center[0], 0.1 * output.teacher.ibot_mean, rtol=1e-5, atol=1e-9)
    assert model.dino_loss.center.any()
    assert model.ibot_patch_loss.center.any()


@pytest.mark.parametrize("extra", ["train.centering=sinkhorn_knopp", "ibot.mask_sample_probability=0"])
def test_centre_that_is_not_used_stays(extra: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL, extra)
    model = build(cfg)
    model.update_teacher(run_step(model, make_batch(cfg)), 0.9)
    assert not model.ibot_patch_loss.center.any()
    assert bool(model.dino_loss.center.any()) == (cfg.train.centering == "centering")


def test_teacher_stays_in_evaluation_mode(make_config: MakeConfig) -> None:
    model = build(make_config(*FULL))
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not model.eval().student.training


# -------------------------------------------------------------------------------------------------------- every setting

SETTINGS = {
    "no local crops": ("crops.local_crops_number=0",),
    "one local crop": ("crops.local_crops_number=1",),
    "no masks": ("ibot.mask_sample_probability=0",),
    "no masks, separate head": ("ibot.mask_sample_probability=0", "ibot.separate_head=true"),
    "no masks, sinkhorn": ("ibot.mask_sample_probability=0", "train.centering=sinkhorn_knopp"),
    "no iBOT": ("ibot.loss_weight=0",),
    "no iBOT, separate head": ("ibot.loss_weight=0", "ibot.separate_head=true"),
    "no KoLeo": ("dino.koleo_loss_weight=0",),
    "no DINO": ("dino.loss_weight=0",),
    "separate head": ("ibot.separate_head=true", "ibot.head_n_prototypes=32"),
    "one-layer heads": ("dino.head_nlayers=1",),
    "class token": ("equi.use_cls=true",),
    "projection": ("equi.projection_dim=40",),
    "projection and class token": ("equi.projection_dim=64", "equi.use_cls=true", "equi.dim=1"),
    "one path step": ("equi.num_steps=1",),
    "four path steps": ("equi.num_steps=4",),
    "end of the path": ("equi.include_final=true",),
    "first block": ("equi.layer=0", "student.num_register_tokens=2", "equi.use_cls=true"),
    "teacher as source": ("equi.source_2=teacher", "equi.use_cls=true"),
    "unmasked images": ("equi.only_unmasked=true",),
    "up-convolutions": ("equi.decoder.type=upconv", "equi.use_cls=true"),
    "up-convolutions, half resolution": ("equi.decoder.type=upconv", "equi.decoder.half_resolution=true"),
    "one decoder each, some patches": ("equi.decoder.shared=false", "equi.decoder.patch_fraction=0.3"),
    "rotation, zeros": ("equi.family=rotation", "equi.fill=zeros"),
    "centering": ("train.centering=centering",),
    "sinkhorn": ("train.centering=sinkhorn_knopp",),
    "registers": ("student.num_register_tokens=4",),
    "chunked blocks": ("student.block_chunks=2",),
    "swiglu": ("student.ffn_layer=swiglufused",),
    "no biases, no LayerScale": (
        "student.qkv_bias=false",
        "student.proj_bias=false",
        "student.ffn_bias=false",
        "student.layerscale=0",
    ),
    "deep stochastic depth": ("student.drop_path_rate=0.9",),
    "bf16": ("compute_precision.autocast=bf16",),
    "everything at once": (
        "ibot.separate_head=true",
        "equi.projection_dim=40",
        "equi.use_cls=true",
        "train.centering=sinkhorn_knopp",
        "student.num_register_tokens=2",
        "crops.local_crops_number=3",
    ),
    "reconstruction alone": EQUI_ONLY,
}


def sound_step(cfg: Config, make_state: MakeState, batch: Batch, values: StepValues) -> dict[str, float]:
    """Run one step, check that everything it logged and left behind is finite, and return what it logged."""
    state = make_state(cfg)
    logged = train_step(state, batch, values, cfg, CPU)
    assert all(math.isfinite(value) for value in logged.values())
    assert all(bool(tensor.isfinite().all()) for tensor in state.model.state_dict().values())
    return logged


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS.keys())
def test_step_is_finite(
    overrides: tuple[str, ...],
    batch_size: int,
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
) -> None:
    cfg = make_config(*FULL, *overrides, f"train.batch_size_per_gpu={batch_size}")
    logged = sound_step(cfg, make_state, make_batch(cfg), step_values)
    assert logged["equi_loss"] > 0 or cfg.equi.only_unmasked  # a batch of one has a mask
    assert logged["grad_norm/backbone"] > 0


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("setup", [OFF, CONTROL], ids=["off", "control"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_step_without_reconstruction_is_finite(
    batch_size: int,
    setup: tuple[str, ...],
    centering: str,
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
) -> None:
    cfg = make_config(*setup, f"train.batch_size_per_gpu={batch_size}", f"train.centering={centering}")
    sound_step(cfg, make_state, make_batch(cfg), step_values)


@pytest.mark.parametrize("setup", [OFF, CONTROL, FULL], ids=["off", "control", "full"])
@pytest.mark.parametrize("overrides", [VICREG, VICREG_ONLY], ids=["beside DINO", "alone"])
def test_step_with_vicreg_is_finite(
    overrides: tuple[str, ...],
    setup: tuple[str, ...],
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
) -> None:
    cfg = make_config(*setup, *overrides, "train.batch_size_per_gpu=3")
    logged = sound_step(cfg, make_state, make_batch(cfg), step_values)
    assert logged["grad_norm/vicreg_expander"] > 0


@pytest.mark.parametrize("features", ["patch_mean", "cls"])
@pytest.mark.parametrize("projection", ["null", "40"])
def test_vicreg_sees_the_invariant_channels_of_the_two_views(
    features: str, projection: str, make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*CONTROL, *VICREG, f"vicreg.features={features}", f"equi.projection_dim={projection}", NO_DROP)
    model, batch = build(cfg), make_batch(cfg)
    seen: list[Tensor] = []
    assert model.expander is not None
    model.expander.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    run_step(model, batch)
    crops_1, crops_2 = batch.global_crops.chunk(2)
    assert model.equi is not None
    view_2 = model.equi.make_views(crops_2, batch.positions, cfg.train.seed).view_2
    images = normalize(torch.cat([crops_1, view_2]), cfg.data.mean, cfg.data.std)
    tokens = backbone_of(model.student)(images, masks=batch.masks, is_training=True)
    wanted = tokens["x_norm_clstoken"] if features == "cls" else tokens["x_norm_patchtokens"].mean(dim=1)
    split: Any = model.student["feature_split"]
    assert len(seen) == 2
    # another order of packing and of the sums
    torch.testing.assert_close(torch.cat(seen), split.invariant(wanted), rtol=1e-4, atol=1e-5)


def test_vicreg_alone_runs_the_teacher_or_the_heads(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(*FULL, *VICREG_ONLY)
    model = build(cfg)
    teacher = Recorder(backbone_of(model.teacher), monkeypatch)
    output = run_step(model, make_batch(cfg))
    assert not teacher.calls
    assert output.teacher is None
    assert not any(p.grad is not None for p in model.student["dino_head"].parameters())
    terms = {"vicreg_invariance_loss", "vicreg_variance_loss", "vicreg_covariance_loss"}
    assert set(output.losses) == terms | {"equi_loss", "total_loss"}


def test_vicreg_beside_the_other_losses_changes_their_initial_weights(make_config: MakeConfig) -> None:
    without, with_vicreg = (build(make_config(*FULL, *overrides)) for overrides in ((), VICREG))
    expander = {f"expander.{name}" for name in with_vicreg.expander.state_dict()}  # type: ignore[union-attr]
    weights, more = without.state_dict(), with_vicreg.state_dict()
    assert set(more) - set(weights) == expander
    assert all(torch.equal(weights[name], more[name]) for name in weights)


def test_terms_that_are_switched_off_are_not_logged(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    def names(*overrides: str) -> set[str]:
        cfg = make_config(*FULL, *overrides)
        return set(run_step(build(cfg), make_batch(cfg)).losses)

    everything = names()
    assert everything - names("crops.local_crops_number=0") == {"dino_local_crops_loss"}
    assert everything - names("ibot.loss_weight=0") == {"ibot_loss"}
    assert everything - names("dino.koleo_loss_weight=0") == {"koleo_loss"}
    assert everything - names(*CONTROL) == {"equi_loss"}


def test_masked_patch_loss_without_a_mask_is_zero(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL, "ibot.mask_sample_probability=0")
    assert run_step(build(cfg), make_batch(cfg)).losses["ibot_loss"].item() == 0.0


@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_crops_that_are_not_square_are_trained_on(
    size: tuple[int, int],
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
) -> None:
    cfg = make_config(*FULL, "equi.use_cls=true")
    sound_step(cfg, make_state, make_batch(cfg, size=size), step_values)


class Grey(RangedFamily):
    """A family that is no planar map: draws pixels towards grey."""

    param_names: tuple[str, ...] = ("grey",)

    def __init__(self, settings: FamilySettings) -> None:
        super().__init__([0.0], [settings.max_contrast])

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        return 0.5 + (images - 0.5) * (1 - theta[..., None, None])


def test_a_new_family_is_trained_on_by_its_name(
    make_config: MakeConfig,
    make_state: MakeState,
    make_batch: MakeBatch,
    step_values: StepValues,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "grey", Grey)
    cfg = make_config(*FULL, "equi.family=grey")
    logged = sound_step(cfg, make_state, make_batch(cfg), step_values)
    assert logged["equi_loss"] > 0


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_trains_on_the_same_views(family: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL, f"equi.family={family}")
    model, batch = build(cfg), make_batch(cfg)
    plain = model._make_views(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model._make_views(batch)
    assert torch.equal(mixed.global_crops, plain.global_crops)
    assert mixed.equi_targets is not None
    assert plain.equi_targets is not None
    assert torch.equal(mixed.equi_targets.images, plain.equi_targets.images)
    assert torch.equal(mixed.equi_targets.theta, plain.equi_targets.theta)


def test_losses_are_float32_under_mixed_precision(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL)
    model = build(cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run_step(model, make_batch(cfg))
    assert {name: value.dtype for name, value in output.losses.items() if value.dtype != torch.float32} == {}
    assert {name: value.dtype for name, value in output.metrics.items() if value.dtype != torch.float32} == {}


# --------------------------------------------------------------------------------------------------- reconstruct, shown


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_reconstruct_shows_views_targets_and_reconstructions(
    size: tuple[int, int], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*FULL)
    model, batch = build(cfg).eval(), make_batch(cfg, size=size)
    preview = model.reconstruct(batch)
    family = build_family("se2")
    theta, crops_2 = draw_theta(family, batch.positions, cfg.train.seed), batch.global_crops.chunk(2)[1]
    assert torch.equal(preview.view_1, batch.global_crops[:4])
    assert torch.equal(preview.view_2, family.apply(crops_2, theta))
    assert torch.equal(preview.targets[1], family.apply(crops_2, theta * (2 / 3)))
    assert preview.reconstructions.shape == preview.targets.shape == (2, 4, 3, *size)
    assert preview.reconstructions.min() > 0
    assert preview.reconstructions.max() < 1
    assert not preview.reconstructions.requires_grad


def test_reconstruct_does_not_mask(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*FULL)
    model, batch = build(cfg).eval(), make_batch(cfg)
    unmasked = dataclasses.replace(batch, masks=torch.zeros_like(batch.masks))
    assert torch.equal(model.reconstruct(batch).reconstructions, model.reconstruct(unmasked).reconstructions)


@pytest.mark.parametrize("setup", [OFF, CONTROL], ids=["off", "control"])
def test_reconstruct_without_a_decoder_says_what_is_not_set(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*setup)
    with pytest.raises(ValueError, match=r"equi.family or equi.loss_weight is not set"):
        build(cfg).reconstruct(make_batch(cfg))


# ---------------------------------------------------------------------------------------------------------- determinism


@each_setup
def test_same_step_from_the_same_state_gives_the_same_bits(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    cfg = make_config(*setup)
    first, second = build(cfg), build(cfg)
    outputs = [run_step(model, make_batch(cfg)) for model in (first, second)]
    assert_same_bits(outputs[0].losses, outputs[1].losses)
    assert_same_bits(gradients(first), gradients(second))
