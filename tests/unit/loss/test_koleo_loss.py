from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dinov2_equi.loss.koleo_loss import MAX_GRADIENT, MAX_GRADIENT_FLOAT16, KoLeoLoss, nearest_neighbors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def koleo_by_loops(features: Tensor) -> float:
    rows = functional.normalize(features.double(), dim=-1).tolist()
    total = 0.0
    for index, row in enumerate(rows):
        distances = [math.dist(row, other) for position, other in enumerate(rows) if position != index]
        total -= math.log(min(distances))
    return total / len(rows)


@pytest.mark.parametrize("batch", [2, 3, 9])
def test_the_loss_differs_from_plain_loops(batch: int) -> None:
    features = torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch))
    # float32, and the 1e-8 that keeps the logarithm finite
    assert KoLeoLoss()(features).item() == pytest.approx(koleo_by_loops(features), abs=1e-5)


def test_the_gradient_differs_from_that_of_the_plain_formula() -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (actual,) = torch.autograd.grad(KoLeoLoss()(features), features)
    unit = functional.normalize(features, dim=-1)
    distances = torch.cdist(unit, unit) + torch.eye(6) * 10
    (expected,) = torch.autograd.grad(-distances.min(dim=1).values.log().mean(), features)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)  # cdist takes another way in float32


def test_the_nearest_neighbour_is_the_row_itself() -> None:
    features = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2]]), dim=-1)
    assert nearest_neighbors(features).tolist() == [1, 0, 3, 2]


def degenerate(kind: str) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    return {
        "all equal": x[:1].repeat(6, 1),
        "one pair": torch.cat((x[:1], x)),
        "equal directions": torch.cat((x, 2 * x)),
        "all zero": torch.zeros(6, 8),
        "one zero": torch.cat((x, torch.zeros(1, 8))),
        "one image": x[:1],
        "no image": x[:0],
        "tiny": x * 1e-6,
        "nearly equal": x[:1] + x * 1e-5,
        "opposite": torch.cat((x[:1], -x[:1])),
    }[kind]


KINDS = [
    "all equal",
    "one pair",
    "equal directions",
    "all zero",
    "one zero",
    "one image",
    "no image",
    "tiny",
    "nearly equal",
    "opposite",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_features_give_an_infinite_loss_or_gradient(kind: str, dtype: torch.dtype) -> None:
    features = degenerate(kind).to(dtype).requires_grad_()
    loss = KoLeoLoss()(features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    # Each row takes part in its own distance and, at most, in all others.
    limit = MAX_GRADIENT_FLOAT16 if dtype == torch.float16 else MAX_GRADIENT
    assert features.grad.float().norm(dim=-1).sum() <= 2 * limit


def test_a_single_image_is_pushed_away_from_itself() -> None:
    features = torch.randn(1, 8, requires_grad=True)
    loss = KoLeoLoss()(features)
    loss.backward()
    assert loss.item() == 0.0
    assert (features.grad == 0).all()


def test_a_pair_of_duplicates_silences_the_other_images() -> None:
    features = degenerate("one pair").requires_grad_()
    KoLeoLoss()(features).backward()
    assert (features.grad[2:] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_or_autocast_changes_the_arithmetic(dtype: torch.dtype) -> None:
    features = torch.randn(8, 16).to(dtype)
    expected = KoLeoLoss()(features.float())
    torch.testing.assert_close(KoLeoLoss()(features), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(KoLeoLoss()(features), expected, rtol=0, atol=0)


def test_the_length_of_a_feature_matters() -> None:
    features = torch.randn(5, 8)
    # the 1e-8 added to the difference of unit vectors, and float32
    torch.testing.assert_close(
        KoLeoLoss()(features * torch.tensor([[1.0], [5.0], [0.1], [2.0], [9.0]])), KoLeoLoss()(features)
    )
