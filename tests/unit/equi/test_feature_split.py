"""The split divides channels, and each half computes what the whole would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_equi.equi.feature_split import FeatureSplit

Noise = Callable[..., Tensor]

D = 12


def test_slices_are_the_first_and_the_last_channels(noise: Noise) -> None:
    split, tokens = FeatureSplit(D, 3), noise(2, 5, D)
    assert (split.invariant_dim, split.equi_dim) == (9, 3)
    assert torch.equal(split.invariant(tokens), tokens[..., :9])
    assert torch.equal(split.equivariant(tokens), tokens[..., 9:])


def test_slices_have_no_parameter() -> None:
    assert not list(FeatureSplit(D, 3).parameters())


@pytest.mark.parametrize("projection_dim", [8, D, 20])
def test_both_halves_together_are_the_full_linear_layer(projection_dim: int, noise: Noise) -> None:
    split, tokens = FeatureSplit(D, 3, projection_dim), noise(2, 5, D)
    assert split.projection is not None
    full = F.linear(tokens, split.projection.weight, split.projection.bias)
    halves = torch.cat([split.invariant(tokens), split.equivariant(tokens)], dim=-1)
    assert halves.shape[-1] == projection_dim == split.invariant_dim + split.equi_dim
    torch.testing.assert_close(halves, full, rtol=1e-5, atol=1e-6)  # sums of 12 terms in another order


def test_projection_equals_plain_loops(noise: Noise) -> None:
    split, tokens = FeatureSplit(D, 2, 5), noise(3, D)
    assert split.projection is not None
    weight, bias = split.projection.weight.detach().double(), split.projection.bias.detach().double()
    for n in range(3):
        for k in range(5):
            value = sum(weight[k, d] * tokens[n, d].double() for d in range(D)) + bias[k]
            actual = split.invariant(tokens)[n, k] if k < 3 else split.equivariant(tokens)[n, k - 3]
            assert actual.item() == pytest.approx(float(value), abs=1e-6)


def test_gradient_of_one_half_reaches_only_its_rows_of_the_projection(noise: Noise) -> None:
    split = FeatureSplit(D, 2, 5)
    assert split.projection is not None
    split.equivariant(noise(3, D)).sum().backward()
    assert split.projection.weight.grad is not None
    assert split.projection.bias.grad is not None
    assert not split.projection.weight.grad[:3].any()
    assert not split.projection.bias.grad[:3].any()
    assert split.projection.weight.grad[3:].all()
    assert split.projection.bias.grad[3:].all()


def test_gradient_of_one_half_of_a_slice_leaves_the_other_channels_alone(noise: Noise) -> None:
    tokens = noise(3, D).requires_grad_()
    FeatureSplit(D, 2).invariant(tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[:, : D - 2].all()
    assert not tokens.grad[:, D - 2 :].any()


def test_class_tokens_and_patch_tokens_are_split_alike(noise: Noise) -> None:
    split, patches = FeatureSplit(D, 3, 8), noise(2, 5, D)
    for half in (split.invariant, split.equivariant):
        torch.testing.assert_close(half(patches[:, 0]), half(patches)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("equi_dim", [1, D - 1])
def test_one_channel_is_enough_for_a_part(equi_dim: int, noise: Noise) -> None:
    split = FeatureSplit(D, equi_dim)
    assert split.equivariant(noise(2, D)).shape == (2, equi_dim)
    assert split.invariant(noise(2, D)).shape == (2, D - equi_dim)


@pytest.mark.parametrize(
    ("equi_dim", "projection_dim", "limit"), [(0, None, 11), (D, None, 11), (-1, None, 11), (8, 8, 7), (9, 8, 7)]
)
def test_width_that_leaves_no_channel_for_a_part_is_refused(
    equi_dim: int, projection_dim: int | None, limit: int
) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {limit}, got {equi_dim}"):
        FeatureSplit(D, equi_dim, projection_dim)
