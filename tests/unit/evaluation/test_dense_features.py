"""Maps of patch features at any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.evaluation.dense_features import (
    at_image_size,
    feature_map,
    fit_size,
    frozen_feature_map,
    resample,
    token_grid,
    whole_patches,
)
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.foreign import load_timm
from dinov2_equi.evaluation.model import RawPixels
from dinov2_equi.models.registry import build_backbone

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def tiny(**options: object) -> EvalModel:
    torch.manual_seed(0)
    backbone = build_backbone("vit_test_tiny", img_size=16, patch_size=8, num_register_tokens=2, init_values=0.5)
    return EvalModel("tiny", backbone, patch_size=8, **options)  # type: ignore[arg-type]


def test_sides_are_not_the_nearest_whole_patches() -> None:
    assert whole_patches((480, 854), 14) == (476, 854)
    assert whole_patches((3, 20), 16) == (16, 16)
    assert whole_patches((24, 31), 16) == (32, 32)
    assert fit_size((1080, 1920), 480, 14) == (476, 854)
    assert fit_size((1920, 1080), 480, 16) == (848, 480)
    assert fit_size((100, 100), (480, 880), 16) == (480, 880)
    assert fit_size((240, 427), 480, 1) == (480, 854)


def test_map_is_transposed_against_the_image() -> None:
    model = tiny()
    found = frozen_feature_map(model, IMAGES)
    assert found.shape == (2, 48, 2, 3)
    tokens = model.tokens(IMAGES).patches
    for y in range(2):
        for x in range(3):
            torch.testing.assert_close(found[:, :, y, x], tokens[:, y * 3 + x])


@pytest.mark.parametrize("block", [None, 1])
def test_parts_are_not_those_of_the_split(block: int | None) -> None:
    model = tiny(split=FeatureSplit(48, 12), split_block=block)
    tokens = model.tokens(IMAGES).patches
    invariant = frozen_feature_map(model, IMAGES, features="invariant").flatten(2).transpose(1, 2)
    torch.testing.assert_close(invariant, tokens[..., :36])
    if block is not None:
        x = (IMAGES - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]
        with torch.no_grad():
            (tokens,) = model.backbone.eval().get_intermediate_layers(x, [block])  # type: ignore[operator]
    equivariant = frozen_feature_map(model, IMAGES, features="equivariant").flatten(2).transpose(1, 2)
    torch.testing.assert_close(equivariant, tokens[..., 36:], atol=1e-5, rtol=0)  # float32, another pass


def test_a_part_of_an_undivided_backbone_is_given() -> None:
    with pytest.raises(ValueError, match="tiny has no features 'equivariant'; it has patches"):
        feature_map(tiny(), IMAGES, features="equivariant")


def test_gradients_do_not_reach_the_backbone_or_leave_frozen_ones() -> None:
    assert feature_map(tiny(), IMAGES).requires_grad
    assert not frozen_feature_map(tiny(), IMAGES).requires_grad


def test_raw_pixels_have_no_grid() -> None:
    model = EvalModel("pixels", RawPixels(), patch_size=1)
    assert frozen_feature_map(model, torch.rand(1, 3, 48, 85)).shape == (1, 3, 16, 16)


def test_grid_of_a_convolutional_network_is_not_found() -> None:
    assert token_grid(15 * 27, (480, 854), 1) == (15, 27)
    assert token_grid(27 * 15, (854, 480), 1) == (27, 15)
    assert token_grid(6, (16, 24), 8) == (2, 3)


def test_a_model_of_timm_refuses_frames_that_are_not_square() -> None:
    model = load_timm("test_vit", pretrained=False)
    wide = at_image_size(model, (96, 160))
    assert frozen_feature_map(wide, torch.rand(1, 3, 96, 160)).shape[2:] == (6, 10)
    assert model.backbone.model.pos_embed.shape[1] != wide.backbone.model.pos_embed.shape[1]  # type: ignore[union-attr]
    other = replace(model, backbone=RawPixels())
    assert at_image_size(other, (96, 160)) is other


def test_resampled_images_leave_their_range() -> None:
    images = (IMAGES > 0.5).float()
    found = resample(images, (40, 17))
    assert found.shape == (2, 3, 40, 17) and 0 <= found.min() and found.max() <= 1
    assert resample(images, (16, 24)) is images
