"""View 2 and targets are what the paper's Equation 1 says, each resampled once from the same crop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.families import FAMILIES, FamilySettings, build_family
from dinov2_equi.equi.sampling import draw_theta, make_path
from dinov2_equi.equi.views import EquiViews, make_views

Noise = Callable[..., Tensor]
SlowWarp = Callable[[Tensor, Tensor, str], Tensor]

B, H, W = 3, 12, 20
ROUNDING = 1e-5  # see test_geometry: float32 coordinates, values in [0, 1]

each_family = pytest.mark.parametrize("name", FAMILIES)


def views_of(crops: Tensor, name: str, num_steps: int = 2) -> tuple[EquiViews, Tensor]:
    family = build_family(name)
    theta = draw_theta(family, torch.arange(len(crops)), seed=0)
    return make_views(crops, family, make_path(family, theta, num_steps)), theta


@each_family
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_shapes_and_types(name: str, num_steps: int, noise: Noise) -> None:
    views, _ = views_of(noise(B, 3, H, W), name, num_steps)
    assert views.view_2.shape == (B, 3, H, W)
    assert views.targets.shape == (num_steps, B, 3, H, W)
    assert views.view_2.dtype == views.targets.dtype == torch.float32


@each_family
def test_view_2_is_the_crop_at_the_end_of_the_path(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    views, theta = views_of(crops, name)
    assert torch.equal(views.view_2, build_family(name).apply(crops, theta))


@each_family
def test_targets_are_the_crop_at_one_third_and_two_thirds_of_theta(name: str, noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family(name)
    views, theta = views_of(crops, name)
    for target, fraction in zip(views.targets, (1 / 3, 2 / 3), strict=True):
        assert torch.equal(target, family.apply(crops, theta * fraction))


def test_targets_equal_plain_loops(noise: Noise, slow_warp: SlowWarp) -> None:
    crops = noise(1, 3, H, W)
    family = build_family("rotation", FamilySettings(fill="reflect"))
    views = make_views(crops, family, make_path(family, torch.tensor([[30.0]]), 2))
    for image, angle in zip([*views.targets[:, 0], views.view_2[0]], (10.0, 20.0, 30.0), strict=True):
        a = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
        forward = torch.tensor([[a.cos(), a.sin(), 0.0], [-a.sin(), a.cos(), 0.0], [0.0, 0.0, 1.0]])
        torch.testing.assert_close(image.double(), slow_warp(crops[0], forward, "reflect"), rtol=0, atol=ROUNDING)


def test_targets_are_not_resampled_from_one_another(noise: Noise) -> None:
    # Two turns of 10 degrees blur the image twice; the target at 20 degrees must be blurred once.
    crops, family = noise(1, 3, H, W), build_family("rotation")
    views = make_views(crops, family, make_path(family, torch.tensor([[30.0]]), 2))
    chained = family.apply(views.targets[0], torch.tensor([[10.0]]))
    assert (views.targets[1] - chained).abs().max() > 0.05


def test_views_of_theta_zero_are_the_crop(noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family("se2")
    views = make_views(crops, family, make_path(family, torch.zeros(B, 3), 2))
    for image in (views.view_2, *views.targets):
        torch.testing.assert_close(image, crops, rtol=0, atol=ROUNDING)


@each_family
def test_view_2_does_not_depend_on_the_number_of_targets(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    assert torch.equal(views_of(crops, name, 1)[0].view_2, views_of(crops, name, 5)[0].view_2)


@each_family
def test_views_of_a_sample_do_not_depend_on_its_batch(name: str, noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family(name)
    together, theta = views_of(crops, name)
    for b in range(B):
        alone = make_views(crops[b : b + 1], family, make_path(family, theta[b : b + 1], 2))
        assert torch.equal(alone.view_2[0], together.view_2[b])
        assert torch.equal(alone.targets[:, 0], together.targets[:, b])


def test_crops_are_not_written_to(noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    copy = crops.clone()
    views, _ = views_of(crops, "se2")
    views.view_2.zero_()
    assert torch.equal(crops, copy)
