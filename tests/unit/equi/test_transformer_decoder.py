"""The transformer decoder: its patches, positions and queries; what its output depends on; some patches alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_equi.config.validate import CHOICES
from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.equi.decoders.registry import DECODERS, build_decoder
from dinov2_equi.equi.decoders.transformer import (
    TransformerDecoder,
    default_width,
    patchify,
    select_patches,
    sincos_position,
    unpatchify,
)

Noise = Callable[..., Tensor]
Tokens = tuple[Tensor, Tensor]

B, GRID, P, D_EQUI, S = 2, (3, 5), 4, 6, 2
N = GRID[0] * GRID[1]
ROUNDING = 1e-5  # float32, two blocks of width 32, outputs in (0, 1)


def settings(**changes: Any) -> DecoderSettings:
    arguments: dict[str, Any] = {"equi_dim": D_EQUI, "patch_size": P, "num_images": S, "width": 32, "depth": 2}
    return DecoderSettings(**(arguments | changes))


def enlarged(decoder: Any) -> Any:
    """Return the decoder with weights large enough that its inputs matter: 0.02 makes an almost uniform grey."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return decoder


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return enlarged(TransformerDecoder(settings(**changes)))


@pytest.fixture
def decoder() -> Any:
    return build()


@pytest.fixture
def tokens(noise: Noise) -> Tokens:
    return noise(B, N, D_EQUI, seed=1) - 0.5, noise(B, N, D_EQUI, seed=2) - 0.5


@pytest.fixture
def cls(noise: Noise) -> Tokens:
    return noise(B, D_EQUI, seed=3) - 0.5, noise(B, D_EQUI, seed=4) - 0.5


def images_of(decoder: nn.Module, tokens: Tokens, cls: Tokens | None = None) -> Tensor:
    images: Tensor = decoder(*tokens, GRID, cls)
    return images


# ----------------------------------------------------------------------------------------------------------- unpatchify


def test_unpatchify_undoes_cutting_into_patches(noise: Noise) -> None:
    images = noise(B, 3, GRID[0] * P, GRID[1] * P)
    patches = F.unfold(images, P, stride=P).transpose(1, 2)  # [B, N, 3 * p * p], rows of patches, channel-major
    assert torch.equal(unpatchify(patches, GRID, P), images)


def test_unpatchify_equals_plain_loops(noise: Noise) -> None:
    (h, w), p = GRID, P
    patches = noise(h * w, 3 * p * p)
    images = unpatchify(patches, GRID, p)
    assert images.shape == (3, h * p, w * p)
    for channel in range(3):
        for row in range(h * p):
            for column in range(w * p):
                cell = (row // p) * w + column // p
                inside = channel * p * p + (row % p) * p + column % p
                assert images[channel, row, column] == patches[cell, inside]


def test_unpatchify_keeps_leading_axes(noise: Noise) -> None:
    patches = noise(S, B, N, 3 * P * P)
    images = unpatchify(patches, GRID, P)
    assert images.shape == (S, B, 3, GRID[0] * P, GRID[1] * P)
    assert torch.equal(images[1, 0], unpatchify(patches[1, 0], GRID, P))


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4), (2, 1)])
@pytest.mark.parametrize("leading", [(), (B,), (S, B)])
def test_patchify_and_unpatchify_undo_each_other(leading: tuple[int, ...], grid: tuple[int, int], noise: Noise) -> None:
    images = noise(*leading, 3, grid[0] * P, grid[1] * P)
    patches = patchify(images, P)
    assert patches.shape == (*leading, grid[0] * grid[1], 3 * P * P)
    assert torch.equal(unpatchify(patches, grid, P), images)
    assert torch.equal(patchify(unpatchify(patches, grid, P), P), patches)


def test_patchify_refuses_part_of_a_patch(noise: Noise) -> None:
    with pytest.raises(RuntimeError):
        patchify(noise(3, 2 * P + 1, P), P)


def test_selected_patches_equal_plain_loops(noise: Noise) -> None:
    patches = noise(S, B, N, 7)
    chosen = torch.tensor([[3, 0, 14], [14, 14, 5]])  # the order counts, and nothing forbids a repetition
    selected = select_patches(patches, chosen)
    assert selected.shape == (S, B, 3, 7)
    for s in range(S):
        for b in range(B):
            for i in range(3):
                assert torch.equal(selected[s, b, i], patches[s, b, chosen[b, i]])


def test_patches_without_leading_axes_are_selected_alike(noise: Noise) -> None:
    tokens, chosen = noise(B, N, 7), torch.tensor([[3, 0], [14, 5]])
    assert torch.equal(select_patches(tokens, chosen), select_patches(tokens[None], chosen)[0])


# ------------------------------------------------------------------------------------------------------------ positions


def test_positions_equal_their_formula() -> None:
    dim, quarter = 16, 4
    positions = sincos_position(GRID, dim)
    for cell in range(N):
        row, column = divmod(cell, GRID[1])
        frequencies = [10_000 ** (-i / quarter) for i in range(quarter)]
        expected = [
            function(place * f) for place in (row, column) for function in (math.sin, math.cos) for f in frequencies
        ]
        torch.testing.assert_close(positions[cell], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 7), (16, 37)])
@pytest.mark.parametrize("dim", [4, 64])
def test_no_two_cells_share_a_position(grid: tuple[int, int], dim: int) -> None:
    positions = sincos_position(grid, dim)
    assert positions.shape == (grid[0] * grid[1], dim)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    # sin and cos of whole numbers below 37 differ by at least |22 - 7 pi| = 0.009; one frequency is 1.
    assert distances.min() > 0.005


# --------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_output_is_one_image_a_step_of_the_size_of_the_grid(num_images: int, tokens: Tokens) -> None:
    images = images_of(build(num_images=num_images), tokens)
    assert images.shape == (num_images, B, 3, GRID[0] * P, GRID[1] * P)
    assert images.dtype == torch.float32


def test_output_lies_between_black_and_white(decoder: Any, tokens: Tokens) -> None:
    images = images_of(decoder, tokens)
    assert images.min() > 0
    assert images.max() < 1
    assert images.std() > 0.05  # and is not all grey


def test_one_decoder_draws_grids_of_any_shape(decoder: Any, noise: Noise) -> None:
    for grid in ((1, 1), (2, 7), (7, 2)):
        n = grid[0] * grid[1]
        images = decoder(noise(1, n, D_EQUI), noise(1, n, D_EQUI), grid)
        assert images.shape == (S, 1, 3, grid[0] * P, grid[1] * P)


@pytest.mark.parametrize("with_cls", [False, True])
def test_patch_of_a_token_is_where_the_token_is(with_cls: bool, decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    # Without blocks nothing is mixed: a token then decides over its own patch and no other.
    decoder.layers = nn.ModuleList()
    given = cls if with_cls else None
    before = images_of(decoder, tokens, given)
    changed = tokens[0].clone()
    changed[:, 1 * GRID[1] + 3] += 1.0  # row 1, column 3
    difference = (images_of(decoder, (changed, tokens[1]), given) - before).abs().amax(dim=(0, 1, 2))
    rows, columns = slice(P, 2 * P), slice(3 * P, 4 * P)
    assert difference[rows, columns].min() > 0
    difference[rows, columns] = 0
    assert difference.max() == 0


def test_blocks_mix_the_tokens_of_an_image(decoder: Any, tokens: Tokens) -> None:
    changed = tokens[0].clone()
    changed[:, 0] += 1.0
    difference = (images_of(decoder, (changed, tokens[1])) - images_of(decoder, tokens)).abs()
    assert difference[..., -P:, -P:].max() > 1e-4  # the first token reaches the last patch


def test_images_of_a_batch_do_not_see_each_other(decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    together = images_of(decoder, tokens, cls)
    for b in range(B):
        alone = images_of(decoder, (tokens[0][b : b + 1], tokens[1][b : b + 1]), (cls[0][b : b + 1], cls[1][b : b + 1]))
        torch.testing.assert_close(alone[:, 0], together[:, b], rtol=0, atol=ROUNDING)


def test_position_of_a_token_matters(decoder: Any, tokens: Tokens) -> None:
    rolled = images_of(decoder, (tokens[0].roll(GRID[1], dims=1), tokens[1].roll(GRID[1], dims=1)))
    assert (rolled.roll(-P, dims=-2) - images_of(decoder, tokens)).abs().max() > 1e-3


def test_order_of_the_views_matters(decoder: Any, tokens: Tokens) -> None:
    assert (images_of(decoder, tokens) - images_of(decoder, (tokens[1], tokens[0]))).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------- steps


def test_steps_differ(decoder: Any, tokens: Tokens) -> None:
    images = images_of(decoder, tokens)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_steps_differ_by_their_queries_alone(decoder: Any, tokens: Tokens) -> None:
    with torch.no_grad():
        decoder.step_queries[1] = decoder.step_queries[0]
    images = images_of(decoder, tokens)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=ROUNDING)


def test_query_of_a_step_changes_that_step_only(decoder: Any, tokens: Tokens) -> None:
    before = images_of(decoder, tokens)
    with torch.no_grad():
        decoder.step_queries[1, 0] += 1.0  # one channel: the norms would hide the same change of all
    after = images_of(decoder, tokens)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=ROUNDING)
    assert (after[1] - before[1]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- inputs


def test_class_tokens_are_used_when_given(decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    images = images_of(decoder, tokens, cls)
    assert images.shape == (S, B, 3, GRID[0] * P, GRID[1] * P)
    assert (images - images_of(decoder, tokens)).abs().max() > 1e-4
    for changed in ((cls[0] + 1, cls[1]), (cls[0], cls[1] + 1)):
        assert (images_of(decoder, tokens, changed) - images).abs().max() > 1e-4


@pytest.mark.parametrize("with_cls", [False, True])
def test_gradients_reach_every_token_of_both_views(with_cls: bool, decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    inputs = [*tokens, *(cls if with_cls else ())]
    for tensor in inputs:
        tensor.requires_grad_()
    images_of(decoder, tokens, cls if with_cls else None).square().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.abs().amax(dim=-1).min() > 0


def test_gradients_reach_every_parameter(decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    images_of(decoder, tokens, cls).square().sum().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_tokens_are_all_it_is_given(decoder: Any) -> None:
    assert list(inspect.signature(decoder.forward).parameters) == ["tokens_1", "tokens_2", "grid", "cls"]


def test_same_tokens_give_the_same_images_at_every_call(decoder: Any, tokens: Tokens) -> None:
    first = images_of(decoder.train(), tokens)
    torch.manual_seed(1)  # nothing is drawn
    assert torch.equal(images_of(decoder, tokens), first)
    assert torch.equal(images_of(decoder.eval(), tokens), first)


def test_bfloat16_tokens_under_autocast_give_float32_images(decoder: Any, tokens: Tokens) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = images_of(decoder, (tokens[0].bfloat16(), tokens[1].bfloat16()))
    assert images.dtype == torch.float32
    # bf16 keeps 8 bits through two blocks whose weights were made ten times larger.
    assert (images - images_of(decoder, tokens)).abs().mean() < 0.02


# -------------------------------------------------------------------------------------------------- some patches alone

every_variant = pytest.mark.parametrize("shared", [True, False], ids=["shared", "one for each image"])


def of_variant(shared: bool) -> Any:
    torch.manual_seed(0)
    return enlarged(build_decoder("transformer", settings(shared=shared)))


@every_variant
@pytest.mark.parametrize("with_cls", [False, True])
def test_all_patches_drawn_one_by_one_are_the_image(
    with_cls: bool, shared: bool, noise: Noise, tokens: Tokens, cls: Tokens
) -> None:
    decoder, given = of_variant(shared), cls if with_cls else None
    every = torch.arange(N).expand(B, N)
    patches = decoder.decode_patches(*tokens, GRID, every, given)
    assert torch.equal(patches, patchify(images_of(decoder, tokens, given), P))


@every_variant
def test_patches_come_in_the_order_in_which_they_were_chosen(shared: bool, tokens: Tokens, cls: Tokens) -> None:
    decoder = of_variant(shared)
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(B)])
    patches = decoder.decode_patches(*tokens, GRID, order, cls)
    expected = select_patches(patchify(images_of(decoder, tokens, cls), P), order)
    torch.testing.assert_close(patches, expected, rtol=0, atol=ROUNDING)


def test_chosen_patches_are_drawn_from_their_own_tokens_alone(decoder: Any, tokens: Tokens, cls: Tokens) -> None:
    chosen = torch.tensor([[3, 0, 14], [7, 2, 5]])
    before = decoder.decode_patches(*tokens, GRID, chosen, cls)
    assert before.shape == (S, B, 3, 3 * P * P)
    others = torch.ones(B, N, dtype=torch.bool).scatter(1, chosen, False)[..., None]
    changed = tuple(torch.where(others, t + 1, t) for t in tokens)
    assert torch.equal(decoder.decode_patches(*changed, GRID, chosen, cls), before)
    assert not torch.equal(decoder.decode_patches(changed[0] + 1, tokens[1], GRID, chosen, cls), before)


def test_chosen_patches_keep_the_position_they_have_in_the_whole_grid(decoder: Any, tokens: Tokens) -> None:
    # Without blocks a patch depends on its own token, and must be the one of the whole image.
    decoder.layers = nn.ModuleList()
    chosen = torch.tensor([[3, 0, 14], [7, 2, 5]])
    expected = select_patches(patchify(images_of(decoder, tokens), P), chosen)
    torch.testing.assert_close(decoder.decode_patches(*tokens, GRID, chosen), expected, rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------------------------ one for each image


def test_one_decoder_for_each_image_equals_separate_decoders(tokens: Tokens, cls: Tokens) -> None:
    joint = of_variant(False)
    assert len(joint.decoders) == S
    separate = [TransformerDecoder(settings(num_images=1)) for _ in range(S)]
    images = []
    for copy, original in zip(separate, joint.decoders, strict=True):
        copy.load_state_dict(original.state_dict())
        images.append(images_of(copy, tokens, cls))
        assert images[-1].shape[0] == 1
    assert torch.equal(images_of(joint, tokens, cls), torch.cat(images))
    assert (images[0] - images[1]).abs().max() > 0.01  # they start from different weights


def test_decoders_of_different_images_share_no_parameter(tokens: Tokens) -> None:
    joint = of_variant(False)
    images_of(joint, tokens)[0].sum().backward()
    first, second = ([p.grad.any() for p in decoder.parameters()] for decoder in joint.decoders)
    assert all(first)
    assert not any(second)
    single = sum(p.numel() for p in TransformerDecoder(settings(num_images=1)).parameters())
    assert sum(p.numel() for p in joint.parameters()) == S * single
    assert sum(p.numel() for p in of_variant(True).parameters()) == single + 32  # one more query


@every_variant
def test_decoder_says_the_patch_size_it_draws(shared: bool) -> None:
    assert build_decoder("transformer", settings(shared=shared, patch_size=2)).patch_size == 2


def test_unknown_decoder_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown decoder 'mlp'; choose one of transformer, upconv"):
        build_decoder("mlp", settings())
    assert CHOICES["equi.decoder.type"] == tuple(DECODERS)


# ------------------------------------------------------------------------------------------------------ width and heads


@pytest.mark.parametrize(("backbone", "width"), [(48, 64), (128, 64), (192, 96), (384, 192), (400, 192), (1024, 512)])
def test_default_width_is_half_the_backbone_in_whole_heads(backbone: int, width: int) -> None:
    assert default_width(backbone) == width
    build(width=width, depth=1)  # is a width it takes


@pytest.mark.parametrize(("width", "num_heads"), [(30, None), (34, 2), (32, 3), (48, 5)])
def test_width_that_does_not_fit_is_refused_with_the_number(width: int, num_heads: int | None) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4 .* got {width}"):
        build(width=width, num_heads=num_heads)


@pytest.mark.parametrize(("width", "num_heads"), [(20, None), (32, 8), (96, None)])
def test_width_and_heads_that_fit_are_taken(width: int, num_heads: int | None, tokens: Tokens) -> None:
    assert images_of(build(width=width, num_heads=num_heads), tokens).isfinite().all()


def test_depth_is_the_number_of_blocks() -> None:
    assert len(build(depth=3).layers) == 3
