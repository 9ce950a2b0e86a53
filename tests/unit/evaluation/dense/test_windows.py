"""Attention in windows is global attention with a mask, whatever the shape of the grid."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.dense.detection import DETECTORS, DetectionModel, DetectionSettings
from dinov2_equi.evaluation.dense.maps import DenseBackbone, last_blocks
from dinov2_equi.evaluation.dense.windows import Windows, attend_in_windows, windowed_tokens
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Softmax over the same scores, summed in another order in float32."""


def make_backbone(registers: int = 0, **options: float) -> DinoVisionTransformer:
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_test_tiny", img_size=32, patch_size=8, init_values=1.0, num_register_tokens=registers, **options
    )
    for token in (backbone.cls_token, backbone.register_tokens):
        if token is not None:
            nn.init.normal_(token)  # as drawn they are all but 0, and an error in them could not be seen
    return backbone.eval()


def mask_of(grid: tuple[int, int], side: int, num_prefix: int) -> Tensor:
    """Return bool [T, T], True where a token (row) sees another one (column): a plain loop."""
    h, w = grid
    places: list[tuple[int, int] | None] = [None] * num_prefix
    places += [(y // side, x // side) for y in range(h) for x in range(w)]
    return torch.tensor([[a is None or b is None or a == b for b in places] for a in places])


@pytest.mark.parametrize(
    ("grid", "side", "num_prefix"),
    [((6, 4), 2, 1), ((5, 7), 3, 1), ((5, 7), 3, 5), ((4, 9), 4, 2), ((1, 3), 2, 1), ((7, 2), 1, 3), ((3, 8), 5, 1)],
)
def test_a_patch_sees_another_window(grid: tuple[int, int], side: int, num_prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, tokens, heads = 2, num_prefix + grid[0] * grid[1], 3
    q, k, v = (torch.randn(images * tokens, heads, 4, generator=generator).requires_grad_() for _ in range(3))
    layout = ((images, tokens),)
    found = attend_in_windows(q, k, v, layout, grid=grid, side=side, num_prefix=num_prefix)
    as_batch = [x.view(images, tokens, heads, 4).transpose(1, 2) for x in (q, k, v)]
    mask = mask_of(grid, side, num_prefix)
    expected = F.scaled_dot_product_attention(*as_batch, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, **ROUNDING)
    weights = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, **ROUNDING)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("side", [6, 50])
def test_window_that_covers_the_image_is_not_global_attention(registers: int, side: int) -> None:
    backbone = make_backbone(registers)
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    (found,) = windowed_tokens(backbone, images, (2,), Windows(side, ()))
    (expected,) = backbone.get_intermediate_layers(images, n=(2,), return_class_token=True)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **ROUNDING)


def test_global_blocks_are_windowed_or_the_others_global() -> None:
    backbone = make_backbone()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    changed = images.clone()
    changed[..., 24:, 24:] += 1.0  # the last patch

    def moved(windows: Windows, block: int) -> Tensor:
        (a, _), (b, _) = (windowed_tokens(backbone, x, (block,), windows)[0] for x in (images, changed))
        return (a - b).abs().amax(dim=2)[0].unflatten(0, (4, 4)) > 1e-6

    first = moved(Windows(2, (1,)), 0)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 2:] = True
    assert torch.equal(first, expected)
    assert moved(Windows(2, (0,)), 0).all()
    assert moved(Windows(2, (1,)), 1).all()
    # Without a global block the class token alone carries it on: seen by all in the block after the one it looked in.
    assert torch.equal(moved(Windows(2, ()), 0), expected) and moved(Windows(2, ()), 1).all()


def test_stochastic_depth_breaks_windows() -> None:
    """A part of the images skips a block: the windows belong to those that are left."""
    backbone = make_backbone(drop_path_rate=0.5, drop_path_uniform=True).train()
    images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found = []
    for windows in (Windows(50, ()), Windows(50, (0, 1, 2))):
        torch.manual_seed(3)
        found.append(windowed_tokens(backbone, images, (2,), windows)[0][0])
    torch.testing.assert_close(*found, **ROUNDING)


@pytest.mark.parametrize("patch_size", [8, 14])
def test_maps_of_windows_are_of_another_shape(patch_size: int) -> None:
    backbone = build_backbone("vit_test_tiny", img_size=4 * patch_size, patch_size=patch_size).eval()
    model = EvalModel("tiny", backbone, patch_size=patch_size)
    images = torch.rand(1, 3, 5 * patch_size - 3, 7 * patch_size, generator=torch.Generator().manual_seed(0))
    found = [
        DenseBackbone(model, last_blocks(model, 2), windows=windows)(images)
        for windows in (None, Windows(9, ()), Windows(3, ()))
    ]
    for plain, covering, small in zip(*found, strict=True):
        torch.testing.assert_close(covering.patches, plain.patches, **ROUNDING)
        torch.testing.assert_close(covering.cls, plain.cls, **ROUNDING)
        assert small.patches.shape == plain.patches.shape and not torch.allclose(small.patches, plain.patches)


def test_windows_of_another_architecture_are_taken() -> None:
    model = EvalModel("pixels", RawPixels(), patch_size=1)
    with pytest.raises(ValueError, match=r"pixels is no backbone of DINOv2's architecture"):
        DenseBackbone(model, (0,), windows=Windows(4, ()))


@pytest.mark.parametrize("detector", DETECTORS)
def test_window_of_a_detector_has_no_effect(detector: str) -> None:
    torch.manual_seed(0)
    model = EvalModel("tiny", make_backbone(), patch_size=8)
    settings = DetectionSettings(detector=detector, size=64, channels=8)
    images = torch.rand(1, 3, 64, 64)
    found = {}
    for window in (0, 2, 8):
        changed = dataclasses.replace(settings, window=window, global_blocks=1)
        maps = DetectionModel(model, changed, 1).pyramid
        assert maps.features.windows == (Windows(window, (2,)) if window else None)
        found[window] = maps._last_map(images)
    torch.testing.assert_close(found[8], found[0], **ROUNDING)
    assert not torch.allclose(found[2], found[0], **ROUNDING)
