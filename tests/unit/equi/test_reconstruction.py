"""The reconstruction objective: its loss, weights, a share of the patches, half the resolution, one view alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.equi.decoders.registry import build_decoder
from dinov2_equi.equi.decoders.transformer import patchify
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.tokens import EquiTargets, EquiTokens

Noise = Callable[..., Tensor]
Views = tuple[EquiTokens, EquiTokens]

B, GRID, P, D_EQUI, S = 2, (3, 5), 4, 6, 2
SIZE = (GRID[0] * P, GRID[1] * P)
N = GRID[0] * GRID[1]
THETA = torch.zeros(B, 1)
CHOSEN = torch.tensor([[3, 0, 14, 7, 1, 2], [7, 2, 5, 4, 3, 0]])  # of 15 patches


def build(kind: str = "transformer", *, half: bool = False, shared: bool = True, **choices: Any) -> Reconstruction:
    torch.manual_seed(0)
    patch_size = P // 2 if half else P
    settings = DecoderSettings(equi_dim=D_EQUI, patch_size=patch_size, num_images=S, width=32, depth=1, shared=shared)
    decoder = build_decoder(kind, settings)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # the initial 0.02 makes an almost uniform grey
    return Reconstruction(decoder, P, **choices)


@pytest.fixture
def views(noise: Noise) -> Views:
    return EquiTokens(noise(B, N, D_EQUI, seed=1) - 0.5), EquiTokens(noise(B, N, D_EQUI, seed=2) - 0.5)


@pytest.fixture
def views_with_cls(views: Views, noise: Noise) -> Views:
    first, second = (replace(view, cls=noise(B, D_EQUI, seed=seed)) for seed, view in enumerate(views, start=3))
    return first, second


@pytest.fixture
def images(noise: Noise) -> Tensor:
    return noise(S, B, 3, *SIZE, seed=9)


every_decoder = pytest.mark.parametrize(
    "choice",
    [{}, {"shared": False}, {"kind": "upconv"}, {"half": True}, {"kind": "upconv", "half": True}],
    ids=["transformer", "one each", "upconv", "half", "upconv, half"],
)


def cell_of(row: int, column: int) -> int:
    """Return the patch in which a pixel of the full resolution lies."""
    return (row // P) * GRID[1] + column // P


def plain_loops(drawn: Tensor, targets: Tensor, weights: Tensor | None) -> list[float]:
    """Return the error of each image, pixel by pixel; `drawn` may have half the resolution."""
    factor = targets.shape[-1] // drawn.shape[-1]
    H, W = drawn.shape[-2:]
    errors = []
    for s in range(S):
        total = sum_of_weights = 0.0
        for b in range(B):
            for y in range(H):
                for x in range(W):
                    weight = 1.0 if weights is None else weights.expand(B, N)[b, cell_of(y * factor, x * factor)].item()
                    for c in range(3):
                        block = targets[s, b, c, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].double()
                        total += weight * (drawn[s, b, c, y, x].item() - float(block.mean())) ** 2
                    sum_of_weights += weight * 3
        errors.append(total / sum_of_weights)
    return errors


@every_decoder
@pytest.mark.parametrize("weighted", ["not", "patches", "images"])
def test_loss_equals_plain_loops_over_pixels(
    weighted: str, choice: dict[str, Any], views: Views, images: Tensor, noise: Noise
) -> None:
    weights = {"not": None, "patches": noise(B, N, seed=6), "images": torch.tensor([[0.0], [1.0]])}[weighted]
    objective = build(**choice)
    output = objective(*views, EquiTargets(images, THETA, weights))
    errors = plain_loops(objective.reconstruct(*views, SIZE).detach(), images, weights)
    assert output.loss.dtype == torch.float32
    assert output.loss.dim() == 0
    assert output.loss.item() == pytest.approx(sum(errors) / S, rel=1e-5)  # float32 sums
    for k, error in enumerate(errors, start=1):
        assert output.metrics[f"equi/error_step_{k}"].item() == pytest.approx(error, rel=1e-5)
        assert output.metrics[f"equi/psnr_step_{k}"].item() == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_only_the_loss_carries_a_gradient(views: Views, images: Tensor) -> None:
    output = build()(*views, EquiTargets(images, THETA))
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


@every_decoder
def test_without_any_weight_the_loss_is_zero_and_its_gradient_finite(
    choice: dict[str, Any], views: Views, images: Tensor
) -> None:
    objective = build(**choice)
    for view in views:
        view.patches.requires_grad_()
    output = objective(*views, EquiTargets(images, THETA, torch.zeros(B, 1)))
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(value.isfinite() for value in output.metrics.values())
    for gradient in (*(p.grad for p in objective.parameters()), *(view.patches.grad for view in views)):
        assert gradient is not None
        assert not gradient.any()


# ------------------------------------------------------------------------------------------------------ half resolution


@pytest.mark.parametrize("kind", ["transformer", "upconv"])
def test_targets_at_half_resolution_are_means_of_four_pixels(kind: str, images: Tensor) -> None:
    resized = build(kind, half=True).resized(images)
    assert resized.shape == (S, B, 3, SIZE[0] // 2, SIZE[1] // 2)
    corners = [images[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]
    torch.testing.assert_close(resized, sum(corners) / 4, rtol=1e-6, atol=0)  # type: ignore[arg-type]


def test_targets_at_full_resolution_stay_as_they_are(images: Tensor) -> None:
    assert build().resized(images) is images


@every_decoder
def test_reconstruction_has_the_size_of_the_resized_targets(
    choice: dict[str, Any], views: Views, images: Tensor
) -> None:
    objective = build(**choice)
    assert objective.reconstruct(*views, SIZE).shape == objective.resized(images).shape


# ------------------------------------------------------------------------------------------------- share of the patches


@pytest.mark.parametrize("choice", [{}, {"shared": False}, {"half": True}], ids=["shared", "one each", "half"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_cls", [False, True])
def test_share_of_the_patches_equals_those_patches_drawn_and_compared(
    with_cls: bool,
    weighted: bool,
    choice: dict[str, Any],
    views: Views,
    views_with_cls: Views,
    images: Tensor,
    noise: Noise,
) -> None:
    given = views_with_cls if with_cls else views
    weights = noise(B, N, seed=6) if weighted else None
    objective, chosen = build(**choice), CHOSEN
    output = objective(*given, EquiTargets(images, THETA, weights, chosen))
    cls = (given[0].cls, given[1].cls) if with_cls else None
    drawn = objective.decoder.decode_patches(given[0].patches, given[1].patches, GRID, chosen, cls)
    wanted = patchify(objective.resized(images), objective.decoder.patch_size)
    total = sum_of_weights = 0.0
    for s in range(S):
        for b in range(B):
            for i, n in enumerate(chosen[b].tolist()):
                weight = 1.0 if weights is None else weights[b, n].item()
                total += weight * (drawn[s, b, i] - wanted[s, b, n]).double().square().mean().item()
                sum_of_weights += weight
    assert output.loss.item() == pytest.approx(total / sum_of_weights, rel=1e-5)


def test_weights_of_whole_images_fit_a_share_of_their_patches(views: Views, images: Tensor) -> None:
    objective = build()
    targets = EquiTargets(images, THETA, torch.tensor([[0.0], [1.0]]), CHOSEN)
    loss = objective(*views, targets).loss
    changed = EquiTokens(torch.cat([views[0].patches[:1] + 1, views[0].patches[1:]]))
    torch.testing.assert_close(objective(changed, views[1], targets).loss, loss, rtol=1e-5, atol=0)


def test_pictures_show_some_patches_alone_after_a_step_that_drew_some(views: Views, images: Tensor) -> None:
    objective = build()
    before = objective.reconstruct(*views, SIZE)
    objective(*views, EquiTargets(images, THETA, chosen=CHOSEN))
    assert torch.equal(objective.reconstruct(*views, SIZE), before)


# ------------------------------------------------------------------------------------------------------------ the views


@every_decoder
def test_both_views_are_seen(choice: dict[str, Any], views: Views, images: Tensor) -> None:
    for view in views:
        view.patches.requires_grad_()
    build(**choice)(*views, EquiTargets(images, THETA)).loss.backward()
    for view in views:
        assert view.patches.grad is not None
        assert view.patches.grad.abs().amax(dim=-1).min() > 0


@pytest.mark.parametrize("chosen", [None, CHOSEN], ids=["all patches", "some"])
def test_view_1_alone_never_sees_view_2(chosen: Tensor | None, views_with_cls: Views, images: Tensor) -> None:
    objective = build(view_1_alone=True)
    view_1, view_2 = views_with_cls
    broken = EquiTokens(torch.full_like(view_2.patches, math.nan), torch.full_like(view_2.patches[:, 0], math.nan))
    targets = EquiTargets(images, THETA, chosen=chosen)
    losses = [objective(view_1, second, targets).loss for second in (view_2, broken, view_1)]
    assert losses[0].isfinite()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(objective.reconstruct(view_1, broken, SIZE), build().reconstruct(view_1, view_1, SIZE))


def test_class_tokens_take_part_when_both_views_have_one(views: Views, views_with_cls: Views) -> None:
    objective = build()
    without, given = objective.reconstruct(*views, SIZE), objective.reconstruct(*views_with_cls, SIZE)
    assert torch.equal(views[0].patches, views_with_cls[0].patches)
    assert (given - without).abs().max() > 1e-4
    assert torch.equal(objective.reconstruct(views_with_cls[0], views[1], SIZE), without)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("size", [(SIZE[0] + P, SIZE[1]), (SIZE[0], SIZE[1] - P), (P, P)])
def test_tokens_that_are_not_the_grid_of_the_images_are_refused_with_both(size: tuple[int, int], views: Views) -> None:
    with pytest.raises(ValueError) as caught:
        build()(*views, EquiTargets(torch.zeros(S, B, 3, *size), THETA))
    assert f"{size[0] // P} x {size[1] // P} patch tokens" in str(caught.value)
    assert f"{size[0]} x {size[1]} image" in str(caught.value)
    assert f"got {N} and {N}" in str(caught.value)


def test_views_of_different_grids_are_refused(views: Views) -> None:
    with pytest.raises(ValueError, match=f"got {N} and {N - 1}"):
        build().reconstruct(views[0], EquiTokens(views[1].patches[:, 1:]), SIZE)


def test_targets_of_another_number_of_images_are_refused(views: Views, noise: Noise) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        build()(*views, EquiTargets(noise(S + 1, B, 3, *SIZE), THETA))
