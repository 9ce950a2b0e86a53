"""The branch as a whole: views from positions, images from tokens, a loss that falls; any family through one door."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.branch import EquiTokens, EquivarianceBranch
from dinov2_equi.equi.decoder import TransformerDecoder
from dinov2_equi.equi.families import FAMILIES, FamilySettings, build_family
from dinov2_equi.equi.sampling import draw_theta

Noise = Callable[..., Tensor]

B, GRID, P, D_EQUI, S = 2, (3, 5), 4, 6, 2
SIZE = (GRID[0] * P, GRID[1] * P)
N = GRID[0] * GRID[1]


def build(family: str = "se2", *, with_decoder: bool = True, num_steps: int = S) -> EquivarianceBranch:
    torch.manual_seed(0)
    decoder = None
    if with_decoder:
        decoder = TransformerDecoder(equi_dim=D_EQUI, patch_size=P, num_steps=num_steps, width=32, depth=1)
    return EquivarianceBranch(build_family(family), num_steps, decoder)


@pytest.fixture
def tokens(noise: Noise) -> tuple[EquiTokens, EquiTokens]:
    return EquiTokens(noise(B, N, D_EQUI, seed=1)), EquiTokens(noise(B, N, D_EQUI, seed=2))


@pytest.fixture
def tokens_with_cls(noise: Noise) -> tuple[EquiTokens, EquiTokens]:
    return (
        EquiTokens(noise(B, N, D_EQUI, seed=1), noise(B, D_EQUI, seed=3)),
        EquiTokens(noise(B, N, D_EQUI, seed=2), noise(B, D_EQUI, seed=4)),
    )


# ---------------------------------------------------------------------------------------------------------------- views


def test_views_are_those_of_the_transforms_drawn_for_the_positions(noise: Noise) -> None:
    branch, crops, positions = build(), noise(B, 3, *SIZE), torch.tensor([7, 3])
    views = branch.make_views(crops, positions, seed=5)
    theta = draw_theta(branch.family, positions, seed=5)
    assert torch.equal(views.view_2, branch.family.apply(crops, theta))
    assert torch.equal(views.targets[0], branch.family.apply(crops, theta * (1 / 3)))
    assert torch.equal(views.targets[1], branch.family.apply(crops, theta * (2 / 3)))


def test_views_follow_their_sample_into_another_batch(noise: Noise) -> None:
    branch, crops = build(), noise(3, 3, *SIZE)
    together = branch.make_views(crops, torch.tensor([7, 3, 11]), seed=5)
    regrouped = branch.make_views(crops[[2, 0]], torch.tensor([11, 7]), seed=5)
    assert torch.equal(regrouped.view_2, together.view_2[[2, 0]])
    assert torch.equal(regrouped.targets, together.targets[:, [2, 0]])


def test_views_change_with_seed_and_position(noise: Noise) -> None:
    branch, crops = build(), noise(1, 3, *SIZE)
    views = [
        branch.make_views(crops, torch.tensor([position]), seed).view_2 for seed, position in ((0, 1), (1, 0), (0, 2))
    ]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_control_run_sees_the_views_of_the_full_run(noise: Noise) -> None:
    crops, positions = noise(B, 3, *SIZE), torch.arange(B)
    control, full = (build(with_decoder=flag).make_views(crops, positions, 0) for flag in (False, True))
    assert torch.equal(control.view_2, full.view_2)
    assert torch.equal(control.targets, full.targets)


# ------------------------------------------------------------------------------------------------------- reconstruction


def test_loss_is_the_mean_squared_error_over_all_steps(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    targets = noise(S, B, 3, *SIZE)
    output = build()(*tokens, targets)
    assert output.reconstructions.shape == targets.shape
    expected = (output.reconstructions.double() - targets.double()).square().mean().item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)  # float32 sums
    assert output.loss.dtype == torch.float32
    assert output.loss.dim() == 0


def test_metrics_say_the_error_of_each_step(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    targets = noise(S, B, 3, *SIZE)
    output = build()(*tokens, targets)
    for k in range(S):
        error = (output.reconstructions[k].double() - targets[k].double()).square().mean().item()
        assert output.metrics[f"equi/error_step_{k + 1}"].item() == pytest.approx(error, rel=1e-5)
        assert output.metrics[f"equi/psnr_step_{k + 1}"].item() == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_only_the_loss_carries_a_gradient(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    output = build()(*tokens, noise(S, B, 3, *SIZE))
    assert output.loss.requires_grad
    assert not output.reconstructions.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


def test_reconstruct_gives_the_images_of_forward(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    branch = build()
    assert torch.equal(branch.reconstruct(*tokens, SIZE), branch(*tokens, noise(S, B, 3, *SIZE)).reconstructions)


def test_reconstruction_depends_on_the_tokens_alone(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    branch = build()
    first = branch(*tokens, noise(S, B, 3, *SIZE, seed=0)).reconstructions
    branch.make_views(noise(B, 3, *SIZE), torch.arange(B), seed=9)  # another transform leaves no trace
    assert torch.equal(branch(*tokens, noise(S, B, 3, *SIZE, seed=1)).reconstructions, first)


def test_transform_parameters_are_no_input() -> None:
    branch = build()
    assert list(inspect.signature(branch.forward).parameters) == ["view_1", "view_2", "targets"]
    assert list(inspect.signature(branch.reconstruct).parameters) == ["view_1", "view_2", "size"]
    assert [field.name for field in dataclasses.fields(EquiTokens)] == ["patches", "cls"]


def test_class_tokens_take_part_when_both_views_have_one(
    tokens: tuple[EquiTokens, EquiTokens], tokens_with_cls: tuple[EquiTokens, EquiTokens]
) -> None:
    branch = build()
    without, given = branch.reconstruct(*tokens, SIZE), branch.reconstruct(*tokens_with_cls, SIZE)
    assert torch.equal(tokens[0].patches, tokens_with_cls[0].patches)
    assert (given - without).abs().max() > 1e-5


def test_loss_falls_when_the_branch_is_trained_on_one_batch(noise: Noise) -> None:
    branch, crops = build(), noise(B, 3, *SIZE)
    views = branch.make_views(crops, torch.arange(B), seed=0)
    patches = torch.nn.functional.unfold(crops, P, stride=P).transpose(1, 2)[..., :D_EQUI]  # part of the pixels
    tokens = EquiTokens(patches), EquiTokens(patches.flip(1))
    optimizer = torch.optim.Adam(branch.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = branch(*tokens, views.targets).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------------------------------- errors


def test_branch_without_decoder_refuses_to_reconstruct(tokens: tuple[EquiTokens, EquiTokens]) -> None:
    branch = build(with_decoder=False)
    with pytest.raises(ValueError, match=r"no decoder \(equi.loss_weight is 0\)"):
        branch.reconstruct(*tokens, SIZE)
    with pytest.raises(ValueError, match="no decoder"):
        branch(*tokens, torch.zeros(S, B, 3, *SIZE))


def test_branch_without_decoder_has_no_parameter() -> None:
    assert not list(build(with_decoder=False).parameters())


@pytest.mark.parametrize("size", [(SIZE[0] + P, SIZE[1]), (SIZE[0], SIZE[1] - P), (P, P)])
def test_tokens_that_are_not_the_grid_of_the_targets_are_refused_with_both(
    size: tuple[int, int], tokens: tuple[EquiTokens, EquiTokens]
) -> None:
    with pytest.raises(ValueError) as caught:
        build()(*tokens, torch.zeros(S, B, 3, *size))
    assert f"{size[0] // P} x {size[1] // P} patch tokens" in str(caught.value)
    assert f"{size[0]} x {size[1]} image" in str(caught.value)
    assert f"got {N}" in str(caught.value)


def test_targets_of_another_number_of_steps_are_refused(tokens: tuple[EquiTokens, EquiTokens]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        build()(*tokens, torch.zeros(S + 1, B, 3, *SIZE))


def test_targets_that_are_no_whole_number_of_patches_are_refused(tokens: tuple[EquiTokens, EquiTokens]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        build()(*tokens, torch.zeros(S, B, 3, SIZE[0] + 1, SIZE[1]))


# --------------------------------------------------------------------------------------------------------- a new family


class Brightness:
    """A family that is no planar map: adds theta to every pixel."""

    param_names: tuple[str, ...] = ("brightness",)

    def __init__(self, settings: FamilySettings) -> None:
        self.fill = settings.fill

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return 0.6 * torch.rand(batch_size, 1, generator=generator) - 0.3

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        return theta * fraction

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        return (images + theta[..., None, None]).clamp(0, 1)  # [(S,) B, P = 1, 1, 1]


def test_a_new_family_needs_one_class_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[EquiTokens, EquiTokens], noise: Noise
) -> None:
    monkeypatch.setitem(FAMILIES, "brightness", Brightness)
    branch, crops = build("brightness", num_steps=2), noise(B, 3, *SIZE) * 0.2 + 0.4  # nothing is clipped
    views = branch.make_views(crops, torch.arange(B), seed=0)
    shift = (views.view_2 - crops).mean(dim=(1, 2, 3))
    for target, fraction in zip(views.targets, (1 / 3, 2 / 3), strict=True):
        torch.testing.assert_close((target - crops).mean(dim=(1, 2, 3)), shift * fraction, rtol=0, atol=1e-6)
    output = branch(*tokens, views.targets)
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert all(p.grad is not None for p in branch.parameters())
