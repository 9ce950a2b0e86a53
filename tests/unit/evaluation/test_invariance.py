"""Similarity of features, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinov2_equi.evaluation.invariance import different_images_similarity, pair_similarity


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def test_pairs_are_not_compared_row_by_row() -> None:
    a, b = random(6, 4, seed=0), random(6, 4, seed=1)
    expected = sum(cosine(x, y) for x, y in zip(a, b, strict=True)) / 6
    assert pair_similarity(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_that_do_not_move_are_called_different() -> None:
    a = random(5, 3, seed=2)
    assert pair_similarity(a, 7 * a) == pytest.approx(1.0)
    assert pair_similarity(a, -a) == pytest.approx(-1.0)


def test_an_image_is_compared_with_itself() -> None:
    a = random(7, 4, seed=3) + 0.5
    pairs = [cosine(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    assert different_images_similarity(a) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


def test_features_of_zero_count_as_similar() -> None:
    assert different_images_similarity(torch.zeros(4, 2)) == 0.0


@pytest.mark.parametrize(("a", "b"), [((3, 2), (4, 2)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_shapes_that_do_not_fit_are_compared(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        pair_similarity(torch.ones(a), torch.ones(b))


def test_one_image_is_compared_with_nothing() -> None:
    with pytest.raises(ValueError, match="at least two images"):
        different_images_similarity(torch.ones(1, 3))
