"""View 2 and the path towards it are what the paper's Equation 1 says, each resampled once from the same crop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.registry import FAMILIES, build_family
from dinov2_equi.equi.sampling import draw_theta, path_points
from dinov2_equi.equi.views import EquiViews, make_views

Noise = Callable[..., Tensor]
SlowWarp = Callable[[Tensor, Tensor, str], Tensor]

B, H, W = 6, 13, 20  # a blur of sigma 2 mirrors 6 pixels; six images meet every member of the mixture
ROUNDING = 1e-5  # see test_geometry: float32 coordinates, values in [0, 1]

each_family = pytest.mark.parametrize("name", FAMILIES)


def views_of(crops: Tensor, name: str, num_steps: int = 2, *, include_final: bool = False) -> tuple[EquiViews, Tensor]:
    family = build_family(name)
    theta = draw_theta(family, torch.arange(len(crops)), seed=0)
    return make_views(crops, family, theta, num_steps, include_final=include_final), theta


@each_family
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_shapes_and_types(name: str, num_steps: int, noise: Noise) -> None:
    views, _ = views_of(noise(B, 3, H, W), name, num_steps)
    assert views.view_2.shape == (B, 3, H, W)
    assert views.path.shape == (num_steps, B, 3, H, W)
    assert views.view_2.dtype == views.path.dtype == torch.float32


@each_family
def test_crops_in_half_precision_give_views_in_full_precision(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W).half()
    views, _ = views_of(crops, name)
    expected, _ = views_of(crops.float(), name)
    assert views.path.dtype == torch.float32
    assert torch.equal(views.path, expected.path)


@each_family
def test_view_2_is_the_crop_at_the_end_of_the_path(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    views, theta = views_of(crops, name)
    torch.testing.assert_close(views.view_2, build_family(name).apply(crops, theta), rtol=0, atol=ROUNDING)


@each_family
def test_views_carry_the_theta_of_their_transforms(name: str, noise: Noise) -> None:
    views, theta = views_of(noise(B, 3, H, W), name)
    assert torch.equal(views.theta, theta)
    assert views.theta.device == torch.device("cpu")


@each_family
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_path_is_the_crop_at_equal_parts_of_theta(name: str, num_steps: int, noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family(name)
    views, theta = views_of(crops, name, num_steps)
    for k, image in enumerate(views.path, start=1):
        expected = family.apply(crops, family.scale(theta, k / (num_steps + 1)))
        torch.testing.assert_close(image, expected, rtol=0, atol=ROUNDING)


@each_family
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_final_image_of_the_path_is_view_2_where_it_is_included(name: str, num_steps: int, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    without, _ = views_of(crops, name, num_steps)
    views, _ = views_of(crops, name, num_steps, include_final=True)
    assert views.path.shape == (num_steps + 1, B, 3, H, W)
    assert torch.equal(views.path[-1], views.view_2)
    assert torch.equal(views.path[:-1], without.path)
    assert torch.equal(views.view_2, without.view_2)


def test_path_equals_plain_loops(noise: Noise, slow_warp: SlowWarp) -> None:
    crops = noise(1, 3, H, W)
    views = make_views(crops, build_family("rotation", FamilySettings(fill="reflect")), torch.tensor([[30.0]]), 2)
    for image, angle in zip([*views.path[:, 0], views.view_2[0]], (10.0, 20.0, 30.0), strict=True):
        a = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
        forward = torch.tensor([[a.cos(), a.sin(), 0.0], [-a.sin(), a.cos(), 0.0], [0.0, 0.0, 1.0]])
        torch.testing.assert_close(image.double(), slow_warp(crops[0], forward, "reflect"), rtol=0, atol=ROUNDING)


def test_images_of_the_path_are_not_resampled_from_one_another(noise: Noise) -> None:
    # Two turns of 10 degrees blur the image twice; the image at 20 degrees must be blurred once.
    crops, family = noise(1, 3, H, W), build_family("rotation")
    views = make_views(crops, family, torch.tensor([[30.0]]), 2)
    chained = family.apply(views.path[0], torch.tensor([[10.0]]))
    assert (views.path[1] - chained).abs().max() > 0.05


@each_family
def test_views_of_the_identity_are_the_crop(name: str, noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family(name)
    identity = family.scale(draw_theta(family, torch.arange(B), seed=0), 0.0)
    views = make_views(crops, family, identity, 2)
    for image in (views.view_2, *views.path):
        torch.testing.assert_close(image, crops, rtol=0, atol=ROUNDING)


@each_family
def test_view_2_does_not_depend_on_the_length_of_the_path(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    expected = views_of(crops, name, 0)[0].view_2
    for num_steps in (1, 5):
        torch.testing.assert_close(views_of(crops, name, num_steps)[0].view_2, expected, rtol=0, atol=ROUNDING)


@each_family
def test_views_of_a_sample_do_not_depend_on_its_batch(name: str, noise: Noise) -> None:
    crops, family = noise(B, 3, H, W), build_family(name)
    together, theta = views_of(crops, name)
    for b in range(B):
        alone = make_views(crops[b : b + 1], family, theta[b : b + 1], 2)
        torch.testing.assert_close(alone.view_2[0], together.view_2[b], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(alone.path[:, 0], together.path[:, b], rtol=0, atol=ROUNDING)


@each_family
def test_all_images_are_made_by_one_call_of_the_family(
    name: str, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, steps = build_family(name), []
    original = family.apply

    def counting(images: Tensor, theta: Tensor) -> Tensor:
        steps.append(theta)
        return original(images, theta)

    monkeypatch.setattr(family, "apply", counting)
    theta = draw_theta(family, torch.arange(B), seed=0)
    make_views(noise(B, 3, H, W), family, theta, 3)
    assert len(steps) == 1
    assert torch.equal(steps[0], path_points(family, theta, 3))


@each_family
def test_crops_are_not_written_to(name: str, noise: Noise) -> None:
    crops = noise(B, 3, H, W)
    copy = crops.clone()
    views, _ = views_of(crops, name)
    views.view_2.zero_()
    views.path.zero_()
    assert torch.equal(crops, copy)
