"""Features that move with the image, on backbones whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.equi import geometry
from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.registry import build_family
from dinov2_equi.evaluation.dense_equivariance import _parts, compare_maps, dense_equivariance, feature_maps_moved
from dinov2_equi.evaluation.eval_model import EvalModel

PATCH = 4
SIZE = (24, 40)


class MeanColours(nn.Module):
    """Means of patches: these move with the image exactly, where it moves by whole patches."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        patches = F.avg_pool2d(x, PATCH).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": patches.mean(dim=1), "x_norm_patchtokens": patches}


class Places(nn.Module):
    """Features say where a patch is and nothing of what it shows: they never move."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        h, w = x.shape[2] // PATCH, x.shape[3] // PATCH
        eye = torch.eye(h * w)[None].expand(len(x), -1, -1)
        return {"x_norm_clstoken": eye[:, 0], "x_norm_patchtokens": eye}


def eval_model(backbone: nn.Module) -> EvalModel:
    return EvalModel("known", backbone, patch_size=PATCH, mean=(0.0,) * 3, std=(1.0,) * 3)


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(0))


SHIFTED = torch.tensor([[2 * PATCH, -PATCH]]).float() * 224 / min(SIZE)
"""Parameters of a translation by two patches to the right and one up."""


def test_features_that_move_with_the_image_are_compared_elsewhere() -> None:
    family = build_family("translation", FamilySettings())
    maps = compare_maps(eval_model(MeanColours()), images(), family, SHIFTED.expand(3, 2))
    assert maps.covered.shape == (3, 6, 10)
    covered = torch.zeros(6, 10, dtype=torch.bool)
    covered[:5, 2:] = True  # what came in from the left and from below was not in the image
    assert torch.equal(maps.covered[0], covered)
    torch.testing.assert_close(maps.found[:, :, covered], maps.expected[:, :, covered], atol=1e-4, rtol=0)
    torch.testing.assert_close(maps.expected[:, :, 0, 2], maps.plain[:, :, 1, 0], atol=1e-4, rtol=0)


def test_map_of_features_is_not_that_of_pixels() -> None:
    """A turn of a map of features of a grid that is not square, against the images of the patches' centres."""
    moves = geometry.compose(geometry.translation(torch.tensor([3.0, -2.0])), geometry.rotation(torch.tensor(20.0)))
    y, x = torch.meshgrid((torch.arange(6) - 2.5) * PATCH, (torch.arange(10) - 4.5) * PATCH, indexing="ij")
    moved, covered = feature_maps_moved(torch.stack([x, y])[None], moves[None], SIZE)
    sources = geometry.transform_points(geometry.inverse(moves), torch.stack([x, y], dim=-1).reshape(-1, 2))
    expected = sources.T.reshape(2, 6, 10)
    assert 10 < covered.sum() < 60
    # Features that are linear in the place are resampled exactly, up to float32.
    torch.testing.assert_close(moved[0][:, covered[0]], expected[:, covered[0]], atol=1e-3, rtol=0)


def test_what_moves_and_what_stays_look_alike() -> None:
    family = build_family("translation", FamilySettings(max_translation_px=70.0))
    options = {"families": {"translation": family}, "batch_size": 2}
    moving = dense_equivariance(eval_model(MeanColours()), images(6), **options)["translation"]  # type: ignore[arg-type]
    assert moving["moved_centred"] > moving["unmoved_centred"] + 0.2
    assert moving["moved"] > moving["other_image"] and abs(moving["other_image_centred"]) < 0.2
    still = dense_equivariance(eval_model(Places()), images(6), **options)["translation"]  # type: ignore[arg-type]
    assert still["unmoved"] == pytest.approx(1.0) and still["moved"] < 0.5


def test_an_identity_is_not_perfect() -> None:
    still = FamilySettings(max_rotation_deg=0.0, max_brightness=0.0, max_contrast=0.0, max_saturation=0.0, max_hue=0.0)
    families = {name: build_family(name, still) for name in ("rotation", "color")}
    for found in dense_equivariance(eval_model(MeanColours()), images(), families).values():
        assert found["moved"] == pytest.approx(1.0, abs=1e-5)  # float32
        assert found["unmoved_centred"] == pytest.approx(1.0, abs=1e-4)


def test_batches_change_the_numbers() -> None:
    families = {"rotation": build_family("rotation", FamilySettings())}
    one, several = (
        dense_equivariance(eval_model(MeanColours()), images(5), families, batch_size=size)["rotation"]
        for size in (5, 2)
    )
    for name in ("moved", "unmoved", "moved_centred"):
        assert math.isclose(one[name], several[name], abs_tol=1e-6)


def test_a_rest_of_one_image_has_no_other() -> None:
    assert [(part.start, part.stop) for part in _parts(5, 2)] == [(0, 2), (2, 5)]
    assert [(part.start, part.stop) for part in _parts(4, 2)] == [(0, 2), (2, 4)]
    with pytest.raises(ValueError, match="at least two images"):
        dense_equivariance(eval_model(MeanColours()), images(1), {})
