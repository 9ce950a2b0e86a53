"""The decoder: geometry of its patches, positions and queries; what its output depends on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_equi.equi.decoder import TransformerDecoder, default_width, sincos_position, unpatchify

Noise = Callable[..., Tensor]
Tokens = tuple[Tensor, Tensor]

B, GRID, P, D_EQUI, S = 2, (3, 5), 4, 6, 2
N = GRID[0] * GRID[1]
ROUNDING = 1e-5  # float32, two blocks of width 32, outputs in (0, 1)


def build(seed: int = 0, **changes: int | float | None) -> TransformerDecoder:
    """Return a decoder with weights large enough that its inputs matter."""
    arguments = {"equi_dim": D_EQUI, "patch_size": P, "num_steps": S, "width": 32, "depth": 2} | changes
    torch.manual_seed(seed)
    decoder = TransformerDecoder(**arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # the initial 0.02 makes an almost uniform grey
    return decoder


@pytest.fixture
def decoder() -> TransformerDecoder:
    return build()


@pytest.fixture
def tokens(noise: Noise) -> Tokens:
    return noise(B, N, D_EQUI, seed=1) - 0.5, noise(B, N, D_EQUI, seed=2) - 0.5


@pytest.fixture
def cls(noise: Noise) -> Tokens:
    return noise(B, D_EQUI, seed=3) - 0.5, noise(B, D_EQUI, seed=4) - 0.5


def images_of(decoder: TransformerDecoder, tokens: Tokens, cls: Tokens | None = None) -> Tensor:
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


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_output_is_one_image_a_step_of_the_size_of_the_grid(num_steps: int, tokens: Tokens) -> None:
    images = images_of(build(num_steps=num_steps), tokens)
    assert images.shape == (num_steps, B, 3, GRID[0] * P, GRID[1] * P)
    assert images.dtype == torch.float32


def test_output_lies_between_black_and_white(decoder: TransformerDecoder, tokens: Tokens) -> None:
    images = images_of(decoder, tokens)
    assert images.min() > 0
    assert images.max() < 1
    assert images.std() > 0.05  # and is not all grey


def test_one_decoder_draws_grids_of_any_shape(decoder: TransformerDecoder, noise: Noise) -> None:
    for grid in ((1, 1), (2, 7), (7, 2)):
        n = grid[0] * grid[1]
        images = decoder(noise(1, n, D_EQUI), noise(1, n, D_EQUI), grid)
        assert images.shape == (S, 1, 3, grid[0] * P, grid[1] * P)


@pytest.mark.parametrize("with_cls", [False, True])
def test_patch_of_a_token_is_where_the_token_is(
    with_cls: bool, decoder: TransformerDecoder, tokens: Tokens, cls: Tokens
) -> None:
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


def test_blocks_mix_the_tokens_of_an_image(decoder: TransformerDecoder, tokens: Tokens) -> None:
    changed = tokens[0].clone()
    changed[:, 0] += 1.0
    difference = (images_of(decoder, (changed, tokens[1])) - images_of(decoder, tokens)).abs()
    assert difference[..., -P:, -P:].max() > 1e-4  # the first token reaches the last patch


def test_images_of_a_batch_do_not_see_each_other(decoder: TransformerDecoder, tokens: Tokens, cls: Tokens) -> None:
    together = images_of(decoder, tokens, cls)
    for b in range(B):
        alone = images_of(decoder, (tokens[0][b : b + 1], tokens[1][b : b + 1]), (cls[0][b : b + 1], cls[1][b : b + 1]))
        torch.testing.assert_close(alone[:, 0], together[:, b], rtol=0, atol=ROUNDING)


def test_position_of_a_token_matters(decoder: TransformerDecoder, tokens: Tokens) -> None:
    rolled = images_of(decoder, (tokens[0].roll(GRID[1], dims=1), tokens[1].roll(GRID[1], dims=1)))
    assert (rolled.roll(-P, dims=-2) - images_of(decoder, tokens)).abs().max() > 1e-3


def test_order_of_the_views_matters(decoder: TransformerDecoder, tokens: Tokens) -> None:
    assert (images_of(decoder, tokens) - images_of(decoder, (tokens[1], tokens[0]))).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------- steps


def test_steps_differ(decoder: TransformerDecoder, tokens: Tokens) -> None:
    images = images_of(decoder, tokens)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_steps_differ_by_their_queries_alone(decoder: TransformerDecoder, tokens: Tokens) -> None:
    with torch.no_grad():
        decoder.step_queries[1] = decoder.step_queries[0]
    images = images_of(decoder, tokens)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=ROUNDING)


def test_query_of_a_step_changes_that_step_only(decoder: TransformerDecoder, tokens: Tokens) -> None:
    before = images_of(decoder, tokens)
    with torch.no_grad():
        decoder.step_queries[1, 0] += 1.0  # one channel: the norms would hide the same change of all
    after = images_of(decoder, tokens)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=ROUNDING)
    assert (after[1] - before[1]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- inputs


def test_class_tokens_are_used_when_given(decoder: TransformerDecoder, tokens: Tokens, cls: Tokens) -> None:
    images = images_of(decoder, tokens, cls)
    assert images.shape == (S, B, 3, GRID[0] * P, GRID[1] * P)
    assert (images - images_of(decoder, tokens)).abs().max() > 1e-4
    for changed in ((cls[0] + 1, cls[1]), (cls[0], cls[1] + 1)):
        assert (images_of(decoder, tokens, changed) - images).abs().max() > 1e-4


@pytest.mark.parametrize("with_cls", [False, True])
def test_gradients_reach_every_token_of_both_views(
    with_cls: bool, decoder: TransformerDecoder, tokens: Tokens, cls: Tokens
) -> None:
    inputs = [*tokens, *(cls if with_cls else ())]
    for tensor in inputs:
        tensor.requires_grad_()
    images_of(decoder, tokens, cls if with_cls else None).square().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.abs().amax(dim=-1).min() > 0


def test_gradients_reach_every_parameter(decoder: TransformerDecoder, tokens: Tokens, cls: Tokens) -> None:
    images_of(decoder, tokens, cls).square().sum().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_tokens_are_all_it_is_given(decoder: TransformerDecoder) -> None:
    assert list(inspect.signature(decoder.forward).parameters) == ["tokens_1", "tokens_2", "grid", "cls"]


def test_same_tokens_give_the_same_images_at_every_call(decoder: TransformerDecoder, tokens: Tokens) -> None:
    first = images_of(decoder.train(), tokens)
    torch.manual_seed(1)  # nothing is drawn
    assert torch.equal(images_of(decoder, tokens), first)
    assert torch.equal(images_of(decoder.eval(), tokens), first)


def test_bfloat16_tokens_under_autocast_give_float32_images(decoder: TransformerDecoder, tokens: Tokens) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = images_of(decoder, (tokens[0].bfloat16(), tokens[1].bfloat16()))
    assert images.dtype == torch.float32
    # bf16 keeps 8 bits through two blocks whose weights were made ten times larger.
    assert (images - images_of(decoder, tokens)).abs().mean() < 0.02


# ------------------------------------------------------------------------------------------------------ width and heads


@pytest.mark.parametrize(("backbone", "width"), [(48, 64), (128, 64), (192, 96), (384, 192), (400, 192), (1024, 512)])
def test_default_width_is_half_the_backbone_in_whole_heads(backbone: int, width: int) -> None:
    assert default_width(backbone) == width
    TransformerDecoder(equi_dim=D_EQUI, patch_size=P, num_steps=S, width=width, depth=1)  # is a width it takes


@pytest.mark.parametrize(("width", "num_heads"), [(30, None), (34, 2), (32, 3), (48, 5)])
def test_width_that_does_not_fit_is_refused_with_the_number(width: int, num_heads: int | None) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4 .* got {width}"):
        build(width=width, num_heads=num_heads)


@pytest.mark.parametrize(("width", "num_heads"), [(20, None), (32, 8), (96, None)])
def test_width_and_heads_that_fit_are_taken(width: int, num_heads: int | None, tokens: Tokens) -> None:
    assert images_of(build(width=width, num_heads=num_heads), tokens).isfinite().all()


def test_depth_is_the_number_of_blocks() -> None:
    assert len(build(depth=3).layers) == 3
