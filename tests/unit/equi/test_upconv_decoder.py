"""The paper's decoder: its layers for each patch size, where its pixels lie, and what its batch norm does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.equi.decoders.registry import DEFAULT_WIDTHS, build_decoder
from dinov2_equi.equi.decoders.upconv import UpconvDecoder

Noise = Callable[..., Tensor]
Tokens = tuple[Tensor, Tensor]

B, GRID, D_EQUI, WIDTH = 2, (3, 5), 6, 32
N = GRID[0] * GRID[1]
ROUNDING = 1e-5  # float32, values in [0, 1]


def build(patch_size: int = 4, width: int = WIDTH) -> UpconvDecoder:
    torch.manual_seed(0)
    return UpconvDecoder(equi_dim=D_EQUI, patch_size=patch_size, width=width)


@pytest.fixture
def tokens(noise: Noise) -> Tokens:
    return noise(B, N, D_EQUI, seed=1) - 0.5, noise(B, N, D_EQUI, seed=2) - 0.5


@pytest.fixture
def cls(noise: Noise) -> Tokens:
    return noise(B, D_EQUI, seed=3) - 0.5, noise(B, D_EQUI, seed=4) - 0.5


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("patch_size", "widths"),
    [
        (16, [32, 16, 8, 8, 3]),  # the published four; no width falls below 8
        (14, [32, 16, 8, 8, 3]),
        (8, [32, 16, 8, 3]),
        (4, [32, 16, 3]),
        (2, [32, 3]),
    ],
)
def test_up_convolutions_double_until_a_patch_is_reached(patch_size: int, widths: list[int]) -> None:
    layers = list(build(patch_size).layers)
    convolutions = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == list(pairwise(widths))
    for index, convolution in enumerate(convolutions):
        norm, activation = layers[3 * index + 1 : 3 * index + 3]
        assert layers[3 * index] is convolution
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(activation, nn.Sigmoid if index == len(convolutions) - 1 else nn.ReLU)
    assert len(layers) == 3 * len(convolutions)


@pytest.mark.parametrize("patch_size", [16, 14, 8, 4, 2])
@pytest.mark.parametrize("grid", [(3, 5), (2, 1)])
def test_image_has_the_size_of_the_grid(patch_size: int, grid: tuple[int, int], noise: Noise) -> None:
    n = grid[0] * grid[1]
    images = build(patch_size)(noise(B, n, D_EQUI, seed=1), noise(B, n, D_EQUI, seed=2), grid)
    assert images.shape == (1, B, 3, grid[0] * patch_size, grid[1] * patch_size)
    assert images.dtype == torch.float32
    assert 0 < images.min() and images.max() < 1
    assert images.std() > 0.05  # and is not all grey


def test_image_of_14_pixel_patches_is_that_of_16_resampled(tokens: Tokens) -> None:
    images = build(14)(*tokens, GRID)
    larger = build(16)(*tokens, GRID)
    size = (GRID[0] * 14, GRID[1] * 14)
    expected = F.interpolate(larger[0], size, mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(images[0], expected, rtol=0, atol=ROUNDING)


def test_image_of_16_pixel_patches_is_not_resampled(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(F, "interpolate", refuse)
    build(16)(*tokens, GRID)
    with pytest.raises(AssertionError, match="resampled"):
        build(14)(*tokens, GRID)


def test_layers_equal_their_definition(tokens: Tokens) -> None:
    decoder = build(4)
    x = torch.cat(tokens, dim=-1) @ decoder.input_projection.weight.T + decoder.input_projection.bias  # [B, N, width]
    maps = torch.stack([torch.stack([x[b, n] for n in range(N)], dim=-1).reshape(-1, *GRID) for b in range(B)])
    for index in (0, 3):
        maps = F.conv_transpose2d(maps, decoder.layers[index].weight, stride=2, padding=1)
        mean, variance = maps.mean(dim=(0, 2, 3), keepdim=True), maps.var(dim=(0, 2, 3), keepdim=True, correction=0)
        maps = (maps - mean) / (variance + 1e-5).sqrt()
        maps = maps.relu() if index == 0 else maps.sigmoid()
    torch.testing.assert_close(decoder(*tokens, GRID)[0], maps, rtol=0, atol=ROUNDING)


# --------------------------------------------------------------------------------------------------------------- inputs


def test_patch_of_a_token_is_where_the_token_is(tokens: Tokens) -> None:
    decoder = build(8)
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer, nn.BatchNorm2d):
            decoder.layers[index] = nn.Identity()  # batch statistics would carry a change everywhere
    before = decoder(*tokens, GRID)
    changed = tokens[0].clone()
    changed[:, 1 * GRID[1] + 3] += 1.0  # row 1, column 3
    difference = (decoder(changed, tokens[1], GRID) - before).abs().amax(dim=(0, 1, 2))
    # Three kernels of 4 with stride 2 reach 1 + 2 + 4 = 7 pixels beyond the patch.
    rows, columns = slice(8 - 7, 16 + 7), slice(24 - 7, 32 + 7)
    assert difference[8:16, 24:32].min() > 0
    difference[rows, columns] = 0
    assert difference.max() == 0


def test_order_of_the_views_matters(tokens: Tokens) -> None:
    decoder = build()
    assert (decoder(*tokens, GRID) - decoder(tokens[1], tokens[0], GRID)).abs().max() > 0.01


def test_class_tokens_are_added_to_every_position(tokens: Tokens, cls: Tokens) -> None:
    decoder = build().eval()
    before, images = decoder(*tokens, GRID), decoder(*tokens, GRID, cls)
    assert ((images - before).abs().amax(dim=(0, 1, 2)) > 0).all()
    with torch.no_grad():
        decoder.input_projection.bias.zero_()  # else it is added twice
    added = tuple(t + c[:, None] for t, c in zip(tokens, cls, strict=True))
    torch.testing.assert_close(decoder(*tokens, GRID, cls), decoder(*added, GRID), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("with_cls", [False, True])
def test_gradients_reach_every_token_and_parameter(with_cls: bool, tokens: Tokens, cls: Tokens) -> None:
    decoder = build(14)
    inputs = [*tokens, *(cls if with_cls else ())]
    for tensor in inputs:
        tensor.requires_grad_()
    decoder(*tokens, GRID, cls if with_cls else None).square().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.abs().amax(dim=-1).min() > 0
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_tokens_are_all_it_is_given() -> None:
    assert list(inspect.signature(build().forward).parameters) == ["tokens_1", "tokens_2", "grid", "cls"]


# ----------------------------------------------------------------------------------------------------------- batch norm


def test_bfloat16_reaches_no_batch_norm(tokens: Tokens) -> None:
    decoder = build(8)
    seen: list[torch.dtype] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    half = (tokens[0].bfloat16(), tokens[1].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = decoder(*half, GRID)
    assert set(seen) == {torch.float32}
    assert images.dtype == torch.float32
    # The linear layer alone rounds to 8 bits; batch norms restore the scale.
    torch.testing.assert_close(images, build(8)(*tokens, GRID), rtol=0, atol=0.05)


def test_a_pass_that_teaches_nothing_changes_the_decoder(tokens: Tokens) -> None:
    # A step that is refused for a NaN must leave nothing behind: no running statistics.
    decoder = build()
    assert not list(decoder.buffers())
    trained = decoder(*tokens, GRID)
    assert torch.equal(decoder.eval()(*tokens, GRID), trained)


# -------------------------------------------------------------------------------------------------------- from settings


def settings(**changes: Any) -> DecoderSettings:
    arguments: dict[str, Any] = {"equi_dim": D_EQUI, "patch_size": 8, "num_images": 3, "width": WIDTH}
    return DecoderSettings(**(arguments | changes))


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_one_decoder_for_each_image_in_any_case(shared: bool, tokens: Tokens, cls: Tokens) -> None:
    torch.manual_seed(0)
    joint: Any = build_decoder("upconv", settings(shared=shared))
    images = joint(*tokens, GRID, cls)
    assert images.shape == (3, B, 3, GRID[0] * 8, GRID[1] * 8)
    for image, original in zip(images, joint.decoders, strict=True):
        copy = UpconvDecoder(equi_dim=D_EQUI, patch_size=8, width=WIDTH)
        copy.load_state_dict(original.state_dict())
        torch.testing.assert_close(copy(*tokens, GRID, cls)[0], image, rtol=0, atol=ROUNDING)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_published_width_does_not_follow_the_backbone() -> None:
    assert {DEFAULT_WIDTHS["upconv"](dim) for dim in (48, 384, 1024)} == {256}


@pytest.mark.parametrize("patch_size", [1, 0])
def test_patch_of_one_pixel_is_refused(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"patch_size >= 2, got {patch_size}"):
        build(patch_size)
