"""Each choice of the branch inside a training step: what it is given, what it must find, what it costs the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.transforms import normalize
from dinov2_equi.equi.families.registry import FAMILIES
from dinov2_equi.equi.metrics import feature_metrics
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.targets import TARGETS
from dinov2_equi.equi.theta_regression import ThetaRegression
from dinov2_equi.equi.tokens import EquiTargets, EquiTokens
from dinov2_equi.train.outputs import StepOutput
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]
Compare = Callable[[dict[str, Tensor], dict[str, Tensor]], None]

B, SIZE, N, EQUI_DIM = 4, (32, 48), 24, 12  # crops that are not square, patches of 8; a quarter of vit_test_tiny
CONTROL = ("equi.loss_weight=0",)
NO_SSL = ("dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0")
NO_MASKS = "ibot.mask_sample_probability=0"
NO_DROP = "student.drop_path_rate=0"
# LayerScale would make all fresh features nearly equal, and what is wrong would not show.
VIVID = (NO_DROP, "student.layerscale=0")

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
"""float32; the packed pass over all crops sums in another order than one over the global crops."""

CHOICES = {
    **{f"target {name}": (f"equi.target={name}",) for name in TARGETS},
    "end of the path": ("equi.include_final=true",),
    "first block": ("equi.layer=0",),
    "last block by number": ("equi.layer=2",),
    "teacher": ("equi.source_2=teacher",),
    "teacher, first block": ("equi.source_2=teacher", "equi.layer=0"),
    "teacher, theta": ("equi.source_2=teacher", "equi.target=theta"),
    "unmasked images": ("equi.only_unmasked=true",),
    "up-convolutions": ("equi.decoder.type=upconv",),
    "one decoder each": ("equi.decoder.shared=false",),
    "some patches": ("equi.decoder.patch_fraction=0.3",),
    "half resolution": ("equi.decoder.half_resolution=true",),
    "mixture": ("equi.family=mixture",),
}
each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


def build(cfg: Config, *, other_teacher: bool = False) -> SSLMetaArch:
    torch.manual_seed(cfg.train.seed)
    model = SSLMetaArch(cfg).train()
    if other_teacher:
        with torch.no_grad():
            for p in model.teacher.parameters():
                p.mul_(1.5)
    return model


def run_step(model: SSLMetaArch, batch: Batch, *, diagnose: bool = False) -> StepOutput:
    torch.manual_seed(17)  # the same images skip the same blocks
    model.zero_grad(set_to_none=True)
    return model.forward_backward(batch, teacher_temp=0.05, diagnose=diagnose)


def backbone_of(network: nn.Module) -> Any:
    assert isinstance(network, nn.ModuleDict)
    return network["backbone"]


def objective_of(model: SSLMetaArch) -> Any:
    assert model.equi is not None
    assert model.equi.objective is not None
    return model.equi.objective


def given_to_objective(model: SSLMetaArch) -> list[tuple[EquiTokens, EquiTokens, EquiTargets]]:
    """Return a list that fills with what the objective is called with."""
    calls: list[Any] = []
    objective_of(model).register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


def views_of(model: SSLMetaArch, batch: Batch) -> tuple[Tensor, Tensor, Any]:
    """Return both crops, and the views of the branch."""
    crops_1, crops_2 = batch.global_crops.chunk(2)
    assert model.equi is not None
    return crops_1, crops_2, model.equi.make_views(crops_2, batch.positions, model.cfg.train.seed)


def normalized_views(model: SSLMetaArch, batch: Batch) -> Tensor:
    crops_1, _, views = views_of(model, batch)
    return normalize(torch.cat([crops_1, views.view_2]), model.cfg.data.mean, model.cfg.data.std)


# ---------------------------------------------------------------------------------------------------------- each target


def wanted_images(model: SSLMetaArch, batch: Batch, target: str) -> list[Tensor]:
    """Return the images [B, 3, H, W] that a target asks for, from the family alone."""
    assert model.equi is not None
    family = model.equi.family
    crops_1, crops_2, views = views_of(model, batch)
    return {
        "path": [family.apply(crops_2, views.theta * (k / 3)) for k in (1, 2)],
        "untransformed": [crops_2],
        "view_2": [family.apply(crops_2, views.theta)],
        "view_1": [crops_1],
        "masked": [crops_1],
    }[target]


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "theta"])
def test_logged_loss_is_the_error_of_the_images_of_the_target(
    target: str, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(f"equi.target={target}")
    model, batch = build(cfg), make_batch(cfg, size=SIZE)
    batch.masks[0, 5] = True  # so that view 1 and view 2 differ in what is hidden
    drawn: list[Tensor] = []
    objective_of(model).decoder.register_forward_hook(lambda module, inputs, images: drawn.append(images.detach()))
    output = run_step(model, batch)
    wanted = wanted_images(model, batch, target)
    assert drawn[0].shape == (len(wanted), B, 3, *SIZE)
    total = count = 0.0
    for image, images in zip(drawn[0], wanted, strict=True):
        for b in range(B):
            for n in range(N):
                if target != "masked" or batch.masks[b, n]:
                    rows, columns = (slice(8 * i, 8 * i + 8) for i in divmod(n, SIZE[1] // 8))
                    error = (image[b, :, rows, columns] - images[b, :, rows, columns]).double().square().mean()
                    total, count = total + error.item(), count + 1
    assert output.losses["equi_loss"].item() == pytest.approx(total / count, rel=1e-5)  # float32 sums


@pytest.mark.parametrize("family", ["se2", "blur", "mixture"])
def test_logged_loss_is_the_error_of_theta(family: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("equi.target=theta", f"equi.family={family}")
    model, batch = build(cfg), make_batch(cfg, size=SIZE)
    said: list[Tensor] = []
    assert isinstance(objective_of(model), ThetaRegression)
    objective_of(model).layers.register_forward_hook(lambda module, inputs, theta: said.append(theta.detach()))
    output = run_step(model, batch)
    _, _, views = views_of(model, batch)
    assert model.equi is not None
    wanted = model.equi.family.normalized(views.theta)
    assert wanted.abs().max() <= 1
    assert said[0].shape == wanted.shape
    assert output.losses["equi_loss"].item() == pytest.approx((said[0] - wanted).square().mean().item(), rel=1e-5)
    assert torch.equal(output.metrics["equi/theta_error"], output.losses["equi_loss"])


@pytest.mark.parametrize("decoder", ["transformer", "upconv"])
def test_end_of_the_path_is_drawn_on_request(decoder: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("equi.include_final=true", f"equi.decoder.type={decoder}")
    model, batch = build(cfg), make_batch(cfg, size=SIZE)
    given = given_to_objective(model)
    output = run_step(model, batch)
    images = given[0][2].images
    _, _, views = views_of(model, batch)
    assert images.shape == (3, B, 3, *SIZE)
    assert torch.equal(images[2], views.view_2)
    errors = [output.metrics[f"equi/error_step_{k}"].item() for k in (1, 2, 3)]
    assert output.losses["equi_loss"].item() == pytest.approx(sum(errors) / 3, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_path_drawn(family: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(f"equi.family={family}")
    model, batch = build(cfg), make_batch(cfg, size=SIZE)
    given = given_to_objective(model)
    output = run_step(model, batch)
    _, crops_2, views = views_of(model, batch)
    images = given[0][2].images
    assert images.shape == (2, B, 3, *SIZE)
    assert (images >= 0).all() and (images <= 1).all()
    distances = [(image - crops_2).square().mean() for image in (*images, views.view_2)]
    assert 0 < distances[0] < distances[2]  # the first step of the path is nearer to its start than the last
    assert output.losses["equi_loss"].isfinite()


def test_masked_target_does_not_train_through_view_2(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("equi.target=masked", *NO_SSL, *VIVID)
    model, batch = build(cfg), make_batch(cfg)
    run_step(model, batch)
    before = {name: p.grad.clone() for name, p in backbone_of(model.student).named_parameters() if p.grad is not None}
    assert before["patch_embed.proj.weight"].any()
    batch.global_crops[B:] = 1 - batch.global_crops[B:]
    run_step(model, batch)
    for name, gradient in before.items():
        assert torch.equal(backbone_of(model.student).get_parameter(name).grad, gradient), name


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("registers", [0, 3])
def test_branch_sees_the_tokens_of_the_chosen_block(
    registers: int, layer: int, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(
        f"equi.layer={layer}", f"student.num_register_tokens={registers}", "equi.use_cls=true", NO_MASKS, *VIVID
    )
    model, batch = build(cfg), make_batch(cfg, size=SIZE)
    given = given_to_objective(model)
    run_step(model, batch)
    ((patches, cls),) = backbone_of(model.student).get_intermediate_layers(
        normalized_views(model, batch), n=[layer], return_class_token=True, norm=True
    )
    view_1, view_2, _ = given[0]
    split: Any = model.student["feature_split"]
    assert view_1.cls is not None
    assert view_2.cls is not None
    torch.testing.assert_close(torch.cat([view_1.patches, view_2.patches]), split.equivariant(patches), **CLOSE)
    torch.testing.assert_close(torch.cat([view_1.cls, view_2.cls]), split.equivariant(cls), **CLOSE)


def test_last_block_by_its_number_is_the_last_block(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    outputs = []
    for layer in ("last", "2"):
        cfg = make_config(f"equi.layer={layer}", *VIVID)
        outputs.append(run_step(build(cfg), make_batch(cfg)).losses)
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_blocks_above_the_chosen_one_learn_nothing_from_the_branch(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config("equi.layer=1", *NO_SSL)
    model = build(cfg)
    run_step(model, make_batch(cfg))
    backbone = backbone_of(model.student)
    moved = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in backbone.block_list()]
    assert moved == [True, True, False]


# -------------------------------------------------------------------------------------------- what it costs the others


def ssl_losses(output: StepOutput) -> dict[str, Tensor]:
    return {name: loss for name, loss in output.losses.items() if name not in ("equi_loss", "total_loss")}


@each_choice
def test_other_losses_of_the_first_step_are_those_of_the_control_run(
    choice: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    drop = "student.drop_path_rate=0.5"
    cfg, control = make_config(*choice, drop), make_config(*choice, *CONTROL, drop)
    with_branch, without = (run_step(build(c), make_batch(c)) for c in (cfg, control))
    assert with_branch.losses["equi_loss"].isfinite()
    assert len(ssl_losses(without)) == 4
    assert_same_bits(ssl_losses(with_branch), ssl_losses(without))


class Passes:
    """Counts the images that the backbones encode, by their size."""

    def __init__(self, model: SSLMetaArch) -> None:
        self.student: list[list[torch.Size]] = []
        self.teacher: list[list[torch.Size]] = []
        for network, calls in ((model.student, self.student), (model.teacher, self.teacher)):
            backbone_of(network).register_forward_pre_hook(
                lambda module, args, calls=calls: calls.append(
                    [crop.shape for crop in (args[0] if isinstance(args[0], list) else [args[0]])]
                )
            )


@each_choice
def test_no_choice_costs_an_encoder_pass_or_an_image(
    choice: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*choice)
    model = build(cfg)
    passes = Passes(model)
    run_step(model, make_batch(cfg), diagnose=True)
    global_crops, local_crops = (8, 3, 32, 32), (8, 3, 16, 16)  # 2 global and 2 local crops of 4 images
    assert passes.student == [[global_crops, local_crops]]
    assert passes.teacher == [[global_crops]]


@each_choice
@pytest.mark.parametrize("projection", [(), ("equi.projection_dim=40", "equi.use_cls=true")], ids=["slice", "linear"])
def test_every_parameter_of_the_objective_gets_a_gradient(
    projection: tuple[str, ...], choice: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*choice, *projection)
    model = build(cfg)
    run_step(model, make_batch(cfg))
    silent = [name for name, p in objective_of(model).named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# ---------------------------------------------------------------------------------------------- view 2 from the teacher


@pytest.mark.parametrize("layer", ["last", "1"])
@pytest.mark.parametrize("projection", ["null", "40"])
def test_view_2_comes_from_the_unmasked_teacher_without_gradient(
    projection: str, layer: str, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(
        "equi.source_2=teacher",
        f"equi.layer={layer}",
        f"equi.projection_dim={projection}",
        "equi.use_cls=true",
        *VIVID,
    )
    model, batch = build(cfg, other_teacher=True), make_batch(cfg, size=SIZE)
    given = given_to_objective(model)
    run_step(model, batch)
    block = 2 if layer == "last" else int(layer)
    images = normalized_views(model, batch)
    ((patches, cls),) = backbone_of(model.teacher).get_intermediate_layers(images, [block], return_class_token=True)
    split: Any = model.teacher["feature_split"]
    view_1, view_2, _ = given[0]
    assert view_2.cls is not None
    torch.testing.assert_close(view_2.patches, split.equivariant(patches)[B:], **CLOSE)
    torch.testing.assert_close(view_2.cls, split.equivariant(cls)[B:], **CLOSE)
    assert not view_2.patches.requires_grad
    assert not view_2.cls.requires_grad
    assert view_1.patches.requires_grad
    assert all(p.grad is None for p in model.teacher.parameters())


def test_view_1_stays_with_the_student_when_view_2_is_the_teachers(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    tokens = []
    for source in ("student", "teacher"):
        cfg = make_config(f"equi.source_2={source}", *VIVID)
        model = build(cfg, other_teacher=True)
        given = given_to_objective(model)
        run_step(model, make_batch(cfg))
        tokens.append(given[0])
    assert torch.equal(tokens[0][0].patches, tokens[1][0].patches)
    assert (tokens[0][1].patches - tokens[1][1].patches).abs().max() > 0.1


def test_student_learns_nothing_from_view_2_of_the_teacher(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where its own tokens of view 2 are wiped out, the student must get the same gradient.
    gradients = []
    for wiped in (False, True):
        cfg = make_config("equi.source_2=teacher", *NO_SSL, *VIVID)
        model = build(cfg, other_teacher=True)
        original = model._equivariant_tokens

        def wipe(
            network: Any, features: Any, student: Any = model.student, original: Any = original, wiped: bool = wiped
        ) -> tuple[EquiTokens, EquiTokens]:
            view_1, view_2 = original(network, features)
            return view_1, EquiTokens(0 * view_2.patches) if wiped and network is student else view_2

        monkeypatch.setattr(model, "_equivariant_tokens", wipe)
        run_step(model, make_batch(cfg))
        gradients.append([p.grad for p in backbone_of(model.student).parameters()])
    assert any(g is not None and g.any() for g in gradients[0])
    for kept, wiped_out in zip(*gradients, strict=True):
        assert (kept is None) == (wiped_out is None)
        assert kept is None or torch.equal(kept, wiped_out)


def test_teacher_runs_for_the_branch_where_no_other_loss_asks(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("equi.source_2=teacher", *NO_SSL)
    model = build(cfg)
    passes = Passes(model)
    output = run_step(model, make_batch(cfg))
    assert passes.teacher == [[(8, 3, 32, 32)]]
    assert output.teacher is None
    assert set(output.losses) == {"equi_loss", "total_loss"}


# ------------------------------------------------------------------------------------------------------ unmasked images


@pytest.mark.parametrize("target", ["path", "theta"])
def test_only_unmasked_images_count(target: str, make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("equi.only_unmasked=true", f"equi.target={target}")
    model, batch = build(cfg), make_batch(cfg)
    hidden = batch.masks.any(dim=1).view(2, B).any(dim=0)
    assert hidden.tolist() == [False, True, False, True]
    given = given_to_objective(model)
    loss = run_step(model, batch).losses["equi_loss"]
    view_1, view_2, targets = given[0]
    alone = objective_of(model)(
        EquiTokens(view_1.patches[~hidden]),
        EquiTokens(view_2.patches[~hidden]),
        EquiTargets(targets.images[:, ~hidden], targets.theta[~hidden]),
    ).loss
    torch.testing.assert_close(loss, alone.detach(), rtol=1e-5, atol=0)


def test_step_without_an_unmasked_image_teaches_the_branch_nothing(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config("equi.only_unmasked=true", "ibot.mask_sample_probability=0.9")
    model, batch = build(cfg), make_batch(cfg)
    batch.masks[:B, 0] = True
    batch = dataclasses.replace(
        batch,
        mask_indices=batch.masks.flatten().nonzero().flatten(),
        mask_weights=torch.ones(int(batch.masks.sum())) / batch.masks.sum(),
    )
    output = run_step(model, batch, diagnose=True)
    assert output.losses["equi_loss"].item() == 0
    assert output.losses["total_loss"].isfinite()
    assert output.metrics["equi/gradient_ratio"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective_of(model).parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.student.parameters())


def test_a_share_of_the_patches_drops_other_paths_than_its_control(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    states = []
    for setup in (("equi.decoder.patch_fraction=0.3",), ("equi.loss_weight=0",)):
        cfg = make_config(*setup, "student.drop_path_rate=0.5")
        model = build(cfg)
        run_step(model, make_batch(cfg))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---------------------------------------------------------------------------------------------------------- diagnostics

DIAGNOSED = {
    "plain": (),
    "separate head, class token": ("ibot.separate_head=true", "equi.use_cls=true"),
    "up-convolutions": ("equi.decoder.type=upconv",),
    "teacher": ("equi.source_2=teacher", "equi.projection_dim=40"),
    "first block": ("equi.layer=0",),
    "some patches": ("equi.decoder.patch_fraction=0.3",),
    "theta": ("equi.target=theta",),
    "no local crops": ("crops.local_crops_number=0",),
    "VICReg": ("vicreg.loss_weight=1", "vicreg.expander_dim=16"),
    "bf16": ("compute_precision.autocast=bf16",),
    "reconstruction alone": NO_SSL,
}


@pytest.mark.parametrize("setup", DIAGNOSED.values(), ids=DIAGNOSED.keys())
def test_diagnostics_change_no_bit_of_losses_gradients_and_buffers(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    cfg = make_config(*setup, "student.drop_path_rate=0.5")
    results = []
    for diagnose in (False, True):
        model = build(cfg)
        output = run_step(model, make_batch(cfg), diagnose=diagnose)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        found |= {f"loss {name}": loss for name, loss in output.losses.items()}
        found["random state"] = torch.get_rng_state()
        results.append((found, output.metrics))
    assert_same_bits(results[0][0], results[1][0])
    new = {"equi/variance_share", "equi/rank_invariant", "equi/rank_equivariant"}
    if "equi.layer=0" not in setup and setup != NO_SSL:
        new.add("equi/gradient_ratio")
    added = {name for name in set(results[1][1]) - set(results[0][1]) if not name.startswith("collapse/")}
    assert added == new
    assert all(value.isfinite() and not value.requires_grad for value in results[1][1].values())


def feature_gradient_norm(cfg: Config, batch: Batch) -> float:
    """Return the norm of the gradient of the total at the normalised tokens of the last block, from one backward."""
    model = build(cfg)
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, outputs: list[dict[str, Tensor]]) -> None:
        for crop in outputs:
            for name in ("x_norm_clstoken", "x_norm_patchtokens"):
                crop[name].retain_grad()
                features.append(crop[name])

    backbone_of(model.student).register_forward_hook(keep)
    run_step(model, batch)
    return math.sqrt(sum(float(f.grad.double().square().sum()) for f in features if f.grad is not None))


@pytest.mark.parametrize(
    "setup",
    [(), ("equi.use_cls=true", "equi.loss_weight=30", "ibot.separate_head=true"), ("equi.source_2=teacher",)],
    ids=["plain", "class token", "teacher"],
)
def test_gradient_ratio_is_that_of_two_explicit_backward_passes(
    setup: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    drop = (*setup, "student.drop_path_rate=0.5", "student.layerscale=0")
    cfg = make_config(*drop)
    batch = make_batch(cfg)
    ratio = run_step(build(cfg), batch, diagnose=True).metrics["equi/gradient_ratio"].item()
    branch = feature_gradient_norm(make_config(*drop, *NO_SSL), batch)
    others = feature_gradient_norm(make_config(*drop, *CONTROL), batch)
    assert branch > 0 and others > 0
    assert ratio == pytest.approx(branch / others, rel=1e-4)  # float32 sums


def test_feature_metrics_are_those_of_the_patch_tokens_of_both_views(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config("equi.projection_dim=40", NO_MASKS, *VIVID)
    model, batch = build(cfg), make_batch(cfg)
    metrics = run_step(model, batch, diagnose=True).metrics
    with torch.no_grad():
        tokens = backbone_of(model.student)(normalized_views(model, batch), is_training=True)["x_norm_patchtokens"]
    split: Any = model.student["feature_split"]
    expected = feature_metrics(split.invariant(tokens.flatten(0, 1)), split.equivariant(tokens.flatten(0, 1)))
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-3), name  # another packing


def test_control_run_is_not_diagnosed(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config(*CONTROL)
    metrics = run_step(build(cfg), make_batch(cfg), diagnose=True).metrics
    assert metrics and all(name.startswith("collapse/") for name in metrics)


# ------------------------------------------------------------------------------------------------------------- pictures


@each_choice
def test_preview_shows_targets_and_reconstructions_of_one_size(
    choice: tuple[str, ...], make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config(*choice)
    model, batch = build(cfg).eval(), make_batch(cfg, size=SIZE)
    if cfg.equi.target == "theta":
        with pytest.raises(ValueError, match="theta is the target"):
            model.reconstruct(batch)
        return
    preview = model.reconstruct(batch)
    num_images = 1 if cfg.equi.target != "path" else 2 + cfg.equi.include_final
    size = (16, 24) if cfg.equi.decoder.half_resolution else SIZE
    assert preview.targets.shape == preview.reconstructions.shape == (num_images, B, 3, *size)
    assert isinstance(objective_of(model), Reconstruction)
    assert torch.equal(preview.targets, objective_of(model).resized(torch.stack(list(targets_of(model, batch)))))


def targets_of(model: SSLMetaArch, batch: Batch) -> Iterator[Tensor]:
    assert model.equi is not None
    _, _, views = views_of(model, batch)
    crops = batch.global_crops.chunk(2)
    positions, seed = batch.positions, model.cfg.train.seed
    yield from model.equi.make_targets(*crops, views, batch.masks, positions=positions, seed=seed).images


def test_preview_takes_view_2_from_the_network_that_training_takes_it_from(
    make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    cfg = make_config("equi.source_2=teacher", *VIVID)
    model, batch = build(cfg, other_teacher=True).eval(), make_batch(cfg, size=SIZE)
    images = normalized_views(model, batch)
    networks: Any = (model.student, model.teacher)
    halves = [
        network["feature_split"].equivariant(network["backbone"](images, is_training=True)["x_norm_patchtokens"])
        for network in networks
    ]
    tokens = EquiTokens(halves[0][:B]), EquiTokens(halves[1][B:])
    expected = objective_of(model).reconstruct(*tokens, SIZE)
    torch.testing.assert_close(model.reconstruct(batch).reconstructions, expected, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- a baseline that is split


def test_baseline_with_a_split_has_the_heads_of_the_full_run_and_plain_views(
    make_config: MakeConfig, make_batch: MakeBatch, assert_same_bits: Compare
) -> None:
    baseline = make_config("equi.family=null", *CONTROL, "equi.split_without_transform=true", "equi.projection_dim=40")
    full = make_config("equi.projection_dim=40")
    models = build(baseline), build(full)
    assert_same_bits(dict(models[0].student.state_dict()), dict(models[1].student.state_dict()))
    assert models[0].equi is None
    seen: list[Tensor] = []
    backbone_of(models[0].student).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    batch = make_batch(baseline)
    output = run_step(models[0], batch, diagnose=True)
    assert torch.equal(seen[0], normalize(batch.global_crops, baseline.data.mean, baseline.data.std))
    assert "equi_loss" not in output.losses
    gradient = models[0].student["feature_split"].projection.weight.grad  # type: ignore[union-attr]
    assert gradient[:30].any()
    assert not gradient[30:].any()  # nobody asks for the equivariant part
