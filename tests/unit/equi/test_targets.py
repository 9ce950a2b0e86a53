"""What each target asks for, and what it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.validate import CHOICES
from dinov2_equi.equi.targets import TARGETS
from dinov2_equi.equi.views import EquiViews

Noise = Callable[..., Tensor]

B, H, W, S = 2, 8, 12, 3


@pytest.fixture
def crops(noise: Noise) -> tuple[Tensor, Tensor]:
    return noise(B, 3, H, W, seed=1), noise(B, 3, H, W, seed=2)


@pytest.fixture
def views(noise: Noise) -> EquiViews:
    return EquiViews(noise(B, 3, H, W, seed=3), noise(S, B, 3, H, W, seed=4), noise(B, 1, seed=5))


def test_each_target_is_the_image_of_its_name(crops: tuple[Tensor, Tensor], views: EquiViews) -> None:
    wanted = {
        "path": views.path,
        "untransformed": crops[1][None],
        "view_2": views.view_2[None],
        "view_1": crops[0][None],
        "masked": crops[0][None],
    }
    for name, images in wanted.items():
        assert torch.equal(TARGETS[name].images(*crops, views), images), name
    assert set(TARGETS) == {*wanted, "theta"}


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "theta"])
def test_images_are_as_many_as_are_said(name: str, crops: tuple[Tensor, Tensor], views: EquiViews) -> None:
    target = TARGETS[name]
    assert len(target.images(*crops, views)) == target.num_images(S, include_final=False)


def test_end_of_the_path_is_one_more_image() -> None:
    assert [TARGETS["path"].num_images(n, include_final=end) for n in (1, 4) for end in (False, True)] == [1, 2, 4, 5]
    assert TARGETS["view_1"].num_images(4, include_final=False) == 1


def test_only_one_target_is_theta_and_only_one_is_blind_to_view_2() -> None:
    assert [name for name, target in TARGETS.items() if target.is_theta] == ["theta"]
    assert [name for name, target in TARGETS.items() if target.is_path] == ["path"]
    assert [name for name, target in TARGETS.items() if target.view_1_alone] == ["masked"]
    assert [name for name, target in TARGETS.items() if target.masked_alone] == ["masked"]


def test_half_precision_crops_become_float32_targets(crops: tuple[Tensor, Tensor], views: EquiViews) -> None:
    half = tuple(crop.half() for crop in crops)
    for name in ("untransformed", "view_1", "masked"):
        assert TARGETS[name].images(half[0], half[1], views).dtype == torch.float32


def test_configuration_offers_these_targets() -> None:
    assert CHOICES["equi.target"] == tuple(TARGETS)
