"""The branch as a whole: views from positions, what has to be found, which images count; any family by one door."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.branch import EquivarianceBranch
from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.equi.decoders.transformer import TransformerDecoder
from dinov2_equi.equi.families.base import FamilySettings, RangedFamily
from dinov2_equi.equi.families.registry import FAMILIES, build_family
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.sampling import draw_patches, draw_theta
from dinov2_equi.equi.targets import TARGETS
from dinov2_equi.equi.tokens import EquiTokens

Noise = Callable[..., Tensor]

B, GRID, P, D_EQUI, S = 2, (3, 5), 4, 6, 2
SIZE = (GRID[0] * P, GRID[1] * P)
N = GRID[0] * GRID[1]


def build(
    family: str = "se2", target: str = "path", *, with_objective: bool = True, num_steps: int = S, **choices: Any
) -> EquivarianceBranch:
    objective = None
    if with_objective:
        torch.manual_seed(0)
        num_images = TARGETS[target].num_images(num_steps, include_final=choices.get("include_final", False))
        settings = DecoderSettings(equi_dim=D_EQUI, patch_size=P, num_images=num_images, width=32, depth=1)
        objective = Reconstruction(TransformerDecoder(settings), P)
    return EquivarianceBranch(build_family(family), objective, target=TARGETS[target], num_steps=num_steps, **choices)


@pytest.fixture
def tokens(noise: Noise) -> tuple[EquiTokens, EquiTokens]:
    return EquiTokens(noise(B, N, D_EQUI, seed=1)), EquiTokens(noise(B, N, D_EQUI, seed=2))


@pytest.fixture
def crops(noise: Noise) -> tuple[Tensor, Tensor]:
    return noise(B, 3, *SIZE, seed=3), noise(B, 3, *SIZE, seed=4)


POSITIONS = torch.tensor([7, 3])
NOTHING_HIDDEN = torch.zeros(2 * B, N, dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("include_final", [False, True])
def test_views_are_those_of_the_transforms_drawn_for_the_positions(include_final: bool, noise: Noise) -> None:
    branch, crops, positions = build(include_final=include_final), noise(B, 3, *SIZE), torch.tensor([7, 3])
    views = branch.make_views(crops, positions, seed=5)
    theta = draw_theta(branch.family, positions, seed=5)
    assert torch.equal(views.theta, theta)
    assert torch.equal(views.view_2, branch.family.apply(crops, theta))
    wanted = [theta * (1 / 3), theta * (2 / 3), theta][: 2 + include_final]
    assert len(views.path) == len(wanted)
    for image, part in zip(views.path, wanted, strict=True):
        assert torch.equal(image, branch.family.apply(crops, part))


def test_views_follow_their_sample_into_another_batch(noise: Noise) -> None:
    branch, crops = build(), noise(3, 3, *SIZE)
    together = branch.make_views(crops, torch.tensor([7, 3, 11]), seed=5)
    regrouped = branch.make_views(crops[[2, 0]], torch.tensor([11, 7]), seed=5)
    assert torch.equal(regrouped.view_2, together.view_2[[2, 0]])
    assert torch.equal(regrouped.path, together.path[:, [2, 0]])
    assert torch.equal(regrouped.theta, together.theta[[2, 0]])


def test_views_change_with_seed_and_position(noise: Noise) -> None:
    branch, crops = build(), noise(1, 3, *SIZE)
    views = [
        branch.make_views(crops, torch.tensor([position]), seed).view_2 for seed, position in ((0, 1), (1, 0), (0, 2))
    ]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize("target", TARGETS)
def test_view_2_is_the_same_whatever_is_to_be_found(target: str, noise: Noise) -> None:
    crops, positions = noise(B, 3, *SIZE), torch.arange(B)
    full = build().make_views(crops, positions, 0)
    for other in (build(target=target), build(target=target, with_objective=False)):
        views = other.make_views(crops, positions, 0)
        assert torch.equal(views.view_2, full.view_2)
        assert torch.equal(views.theta, full.theta)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("with_objective", [True, False])
def test_images_of_the_path_that_nobody_asked_for_are_made(target: str, with_objective: bool, noise: Noise) -> None:
    branch = build(target=target, num_steps=3, with_objective=with_objective)
    num_images = len(branch.make_views(noise(B, 3, *SIZE), torch.arange(B), 0).path)
    assert num_images == (3 if target == "path" and with_objective else 0)


# -------------------------------------------------------------------------------------------------------------- targets


def test_theta_is_given_as_a_share_of_its_range(crops: tuple[Tensor, Tensor]) -> None:
    branch = build()
    views = branch.make_views(crops[1], torch.tensor([7, 3]), seed=5)
    targets = branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0)
    torch.testing.assert_close(targets.theta, views.theta / torch.tensor([45.0, 10.0, 10.0]), rtol=1e-6, atol=1e-7)


def test_without_a_choice_all_patches_count_alike(crops: tuple[Tensor, Tensor]) -> None:
    branch = build()
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    assert branch.make_targets(*crops, views, ~NOTHING_HIDDEN, positions=POSITIONS, seed=0).weights is None


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 8), (0.4, 6), (0.01, 1), (0.999, 15), (1.0, 15)])
def test_number_of_patches_is_the_share_rounded_and_at_least_one(fraction: float, count: int) -> None:
    assert build(patch_fraction=fraction).num_drawn_patches(15) == count


def test_patches_to_draw_are_those_of_the_sample_positions(crops: tuple[Tensor, Tensor]) -> None:
    branch = build(patch_fraction=0.4)
    views = branch.make_views(crops[1], POSITIONS, seed=5)
    chosen = branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=5).chosen
    assert chosen is not None
    assert torch.equal(chosen, draw_patches(POSITIONS, 5, num_patches=N, count=6))
    assert build().make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=5).chosen is None


@pytest.mark.parametrize("target", ["path", "view_1", "theta"])
@pytest.mark.parametrize(
    ("hidden", "weights"),
    [
        ([], [1.0, 1.0]),
        ([(0, 3)], [0.0, 1.0]),  # in view 1 of the first image
        ([(B + 1, 14)], [1.0, 0.0]),  # in view 2 of the second one
        ([(0, 0), (B, 1)], [0.0, 1.0]),
        ([(0, 0), (1, 1)], [0.0, 0.0]),
    ],
)
def test_only_images_without_a_mask_in_either_view_count(
    target: str, hidden: list[tuple[int, int]], weights: list[float], crops: tuple[Tensor, Tensor]
) -> None:
    branch = build(target=target, only_unmasked=True)
    masks = NOTHING_HIDDEN.clone()
    for crop, patch in hidden:
        masks[crop, patch] = True
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    given = branch.make_targets(*crops, views, masks, positions=POSITIONS, seed=0).weights
    assert given is not None
    assert given.shape == (B, 1)
    assert given.flatten().tolist() == weights


def test_masked_target_counts_the_patches_hidden_from_view_1(crops: tuple[Tensor, Tensor], noise: Noise) -> None:
    branch, masks = build(target="masked"), noise(2 * B, N, seed=8) < 0.5
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    weights = branch.make_targets(*crops, views, masks, positions=POSITIONS, seed=0).weights
    assert weights is not None
    assert torch.equal(weights, masks[:B].float())


# ----------------------------------------------------------------------------------------------------------- the result


def test_transform_parameters_are_no_input() -> None:
    branch = build()
    assert list(inspect.signature(branch.forward).parameters) == ["view_1", "view_2", "targets"]
    assert branch.objective is not None
    assert list(inspect.signature(branch.objective.reconstruct).parameters) == ["view_1", "view_2", "size"]  # type: ignore[arg-type]
    assert [field.name for field in dataclasses.fields(EquiTokens)] == ["patches", "cls"]


def test_result_is_that_of_the_objective(tokens: tuple[EquiTokens, EquiTokens], crops: tuple[Tensor, Tensor]) -> None:
    branch = build()
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    targets = branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0)
    output, expected = branch(*tokens, targets), branch.objective(*tokens, targets)  # type: ignore[misc]
    assert torch.equal(output.loss, expected.loss)
    assert output.metrics.keys() == expected.metrics.keys()


def test_loss_falls_when_the_branch_is_trained_on_one_batch(crops: tuple[Tensor, Tensor]) -> None:
    branch = build()
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    targets = branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0)
    patches = torch.nn.functional.unfold(crops[1], P, stride=P).transpose(1, 2)[..., :D_EQUI]  # part of the pixels
    tokens = EquiTokens(patches), EquiTokens(patches.flip(1))
    optimizer = torch.optim.Adam(branch.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = branch(*tokens, targets).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------------------------------- errors


def test_branch_without_objective_refuses_to_look_for_anything(
    tokens: tuple[EquiTokens, EquiTokens], crops: tuple[Tensor, Tensor]
) -> None:
    branch = build(with_objective=False)
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    with pytest.raises(ValueError, match=r"no objective \(equi.loss_weight is 0\)"):
        branch(*tokens, branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0))


def test_branch_without_objective_has_no_parameter() -> None:
    assert not list(build(with_objective=False).parameters())


@pytest.mark.parametrize("num_steps", [0, -1])
def test_path_without_an_image_between_the_views_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least one intermediate image, got num_steps={num_steps}"):
        build(num_steps=num_steps, with_objective=False)


def test_objective_for_another_number_of_images_is_refused(
    tokens: tuple[EquiTokens, EquiTokens], crops: tuple[Tensor, Tensor]
) -> None:
    branch = build(num_steps=S)
    branch.num_steps = S + 1
    views = branch.make_views(crops[1], torch.arange(B), seed=0)
    with pytest.raises(ValueError, match="must have one shape"):
        branch(*tokens, branch.make_targets(*crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0))


# --------------------------------------------------------------------------------------------------------- a new family


class Lightness(RangedFamily):
    """A family that is no planar map: adds theta to every pixel."""

    param_names: tuple[str, ...] = ("lightness",)

    def __init__(self, settings: FamilySettings) -> None:
        super().__init__([-settings.max_brightness], [settings.max_brightness])

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        return (images + theta[..., None, None]).clamp(0, 1)  # [S, B, P = 1, 1, 1]


def test_a_new_family_needs_one_class_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[EquiTokens, EquiTokens], noise: Noise
) -> None:
    monkeypatch.setitem(FAMILIES, "lightness", Lightness)
    branch, crops = build("lightness"), noise(B, 3, *SIZE) * 0.1 + 0.45  # nothing is clipped
    views = branch.make_views(crops, torch.arange(B), seed=0)
    shift = (views.view_2 - crops).mean(dim=(1, 2, 3))
    assert (shift.abs() > 0.01).all()
    for image, fraction in zip(views.path, (1 / 3, 2 / 3), strict=True):
        torch.testing.assert_close((image - crops).mean(dim=(1, 2, 3)), shift * fraction, rtol=0, atol=1e-6)
    output = branch(*tokens, branch.make_targets(crops, crops, views, NOTHING_HIDDEN, positions=POSITIONS, seed=0))
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert all(p.grad is not None for p in branch.parameters())
