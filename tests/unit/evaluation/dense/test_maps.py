"""Maps of tokens of images of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov2_equi.evaluation.dense.maps import (
    DenseBackbone,
    last_blocks,
    padded_size,
    patch_grid,
    spaced_blocks,
    to_image_size,
)
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.foreign import load_timm
from dinov2_equi.evaluation.model import RawPixels, random_backbone


def make_model(patch_size: int = 8) -> EvalModel:
    backbone = random_backbone("vit_test_tiny", img_size=32, patch_size=patch_size)
    return EvalModel(name="tiny", backbone=backbone, patch_size=patch_size)


def test_map_of_a_whole_number_of_patches_differs_from_the_tokens() -> None:
    model = make_model()
    images = torch.rand(2, 3, 24, 40)
    (found,) = DenseBackbone(model, last_blocks(model, 1))(images)
    tokens = model.tokens(images)
    assert found.patches.shape == (2, 48, 3, 5)
    assert torch.equal(found.patches.flatten(2).transpose(1, 2), tokens.patches)
    assert torch.equal(found.cls, tokens.cls)


def test_image_that_is_no_multiple_of_the_patch_is_refused_or_shifted() -> None:
    model = make_model()
    image = torch.rand(1, 3, 21, 34)
    (found,) = DenseBackbone(model, last_blocks(model, 1))(image)
    mean = torch.tensor(model.mean).view(1, 3, 1, 1)
    by_hand = mean.expand(1, 3, 24, 40).clone()
    by_hand[..., :21, :34] = image
    # 1e-5: the mean colour becomes 0 by subtraction here and by filling there
    assert torch.allclose(found.patches.flatten(2).transpose(1, 2), model.tokens(by_hand).patches, atol=1e-5)


def test_intermediate_block_is_another_one() -> None:
    model = make_model()
    images = torch.rand(1, 3, 16, 24)
    maps = DenseBackbone(model, (0, 2))(images)
    expected = model.backbone.get_intermediate_layers(  # type: ignore[operator]
        (images - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1),
        n=[0, 2],
        reshape=True,
    )
    for found, wanted in zip(maps, expected, strict=True):
        assert torch.equal(found.patches, wanted)


@pytest.mark.parametrize(
    ("blocks", "n", "spaced", "last"),
    [(12, 4, (2, 5, 8, 11), (8, 9, 10, 11)), (24, 4, (5, 11, 17, 23), (20, 21, 22, 23)), (1, 4, (0, 0, 0, 0), (0,))],
)
def test_blocks_that_are_read(blocks: int, n: int, spaced: tuple[int, ...], last: tuple[int, ...]) -> None:
    model = make_model()
    model.backbone.n_blocks = blocks  # type: ignore[assignment]
    assert spaced_blocks(model, n) == spaced and last_blocks(model, n) == last


def test_frozen_backbone_gets_gradients_or_training_mode() -> None:
    model = make_model()
    frozen = DenseBackbone(model, (2,)).train()
    assert frozen.training and not model.backbone.training
    assert not frozen(torch.rand(1, 3, 16, 16))[0].patches.requires_grad
    trained = DenseBackbone(model, (2,), is_frozen=False).train()
    trained(torch.rand(1, 3, 16, 16))[0].patches.sum().backward()
    without = {name for name, value in model.backbone.named_parameters() if value.grad is None}
    assert model.backbone.training and without == {"mask_token"}


def test_backbone_of_another_library_is_trained_on() -> None:
    pixels = EvalModel(name="pixels", backbone=RawPixels(), patch_size=1)
    with pytest.raises(ValueError, match="pixels is a backbone of another library"):
        DenseBackbone(pixels, (0,), is_frozen=False)
    with pytest.raises(ValueError, match="has the blocks 0 to 2, asked for \\[3\\]"):
        DenseBackbone(make_model(), (3,))


def test_raw_pixels_have_no_map() -> None:
    dense = DenseBackbone(EvalModel(name="pixels", backbone=RawPixels(), patch_size=1), (0,))
    assert dense(torch.rand(2, 3, 30, 50))[0].patches.shape == (2, 3, 16, 16)
    assert dense.widths() == [(3, 768)]


@pytest.mark.parametrize(
    ("count", "size", "patch", "grid"),
    [
        (15, (24, 40), 8, (3, 5)),
        (300, (480, 640), 1, (15, 20)),
        (192, (500, 375), 1, (16, 12)),
        (7, (9, 90), 1, (1, 7)),
    ],
)
def test_grid_of_patches(count: int, size: tuple[int, int], patch: int, grid: tuple[int, int]) -> None:
    assert patch_grid(count, size, patch) == grid


def test_map_at_image_size_is_stretched_over_the_filling() -> None:
    assert padded_size((21, 34), 8) == (24, 40) and padded_size((24, 40), 8) == (24, 40)
    maps = torch.rand(1, 2, 3, 5)
    found = to_image_size(maps, (21, 34), 8)
    whole = F.interpolate(maps, (24, 40), mode="bilinear", align_corners=False)
    assert torch.equal(found, whole[..., :21, :34])


def test_backbone_of_timm_takes_images_of_its_own_size_alone() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = load_timm("test_vit", pretrained=False)  # made for 160 pixels, patches of 16
    maps = DenseBackbone(model, last_blocks(model, 2))(torch.rand(1, 3, 40, 90))
    assert [found.patches.shape for found in maps] == [(1, 64, 3, 6)] * 2


class FixedSize(nn.Module):
    def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        assert x.shape[-1] == 224, "Input width doesn't match model (224)"
        return {}


def test_backbone_with_a_fixed_size_gives_an_assertion() -> None:
    dense = DenseBackbone(EvalModel(name="fixed", backbone=FixedSize(), patch_size=16), (0,))
    with pytest.raises(ValueError, match=r"fixed does not take images of 48 x 32 pixels \(Input width"):
        dense(torch.rand(1, 3, 30, 40))
