from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinov2_equi.loss.vicreg_loss import EPS, VICRegLoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def views(batch: int, dim: int, scale: float = 0.5) -> tuple[Tensor, Tensor]:
    z = scale * torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(batch))
    return z[0], z[1]


def vicreg_by_loops(z_1: Tensor, z_2: Tensor) -> tuple[float, float, float]:
    B, D = z_1.shape
    rows = [z_1.double().tolist(), z_2.double().tolist()]
    invariance = sum((rows[0][b][d] - rows[1][b][d]) ** 2 for b in range(B) for d in range(D)) / (B * D)
    variance = covariance = 0.0
    for view in rows:
        mean = [sum(row[d] for row in view) / B for d in range(D)]

        def cov(c: int, d: int, view: list[list[float]] = view, mean: list[float] = mean) -> float:
            return sum((row[c] - mean[c]) * (row[d] - mean[d]) for row in view) / (B - 1)

        variance += sum(max(0.0, 1.0 - math.sqrt(cov(d, d) + EPS)) for d in range(D)) / D / 2
        covariance += sum(cov(c, d) ** 2 for c in range(D) for d in range(D) if c != d) / D
    return invariance, variance, covariance


@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (5, 4), (16, 7)])
def test_the_terms_differ_from_plain_loops(batch: int, dim: int) -> None:
    z_1, z_2 = views(batch, dim)
    actual = [term.item() for term in VICRegLoss()(z_1, 2.5 * z_2)]  # 2.5: some channels beyond the hinge
    # float32; the covariance is a difference of two sums
    assert actual == pytest.approx(vicreg_by_loops(z_1, 2.5 * z_2), rel=1e-5, abs=1e-6)


def test_uncorrelated_wide_equal_embeddings_cost_something() -> None:
    z = 2.0 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert [term.item() for term in VICRegLoss()(z, z)] == [0.0, 0.0, 0.0]


def test_one_view_or_one_channel_weighs_more_than_another() -> None:
    z_1, z_2 = views(6, 4)
    straight, swapped = VICRegLoss()(z_1, z_2), VICRegLoss()(z_2.flip(1), z_1.flip(1))
    torch.testing.assert_close(torch.stack(straight), torch.stack(swapped), rtol=1e-6, atol=0)  # order of the sums


def test_a_collapsed_embedding_gets_no_gradient_away_from_the_point() -> None:
    z_1, z_2 = (1e-3 * z for z in views(8, 4))
    z_1.requires_grad_()
    terms = VICRegLoss()(z_1, z_2)
    (gradient,) = torch.autograd.grad(terms.variance, z_1)
    centred = z_1.detach() - z_1.detach().mean(dim=0)
    assert (gradient * centred).sum() < 0  # descent scales the embeddings up
    assert terms.variance > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one image", "duplicates", "zeros", "large"])
def test_degenerate_embeddings_give_an_infinite_term_or_gradient(kind: str, dtype: torch.dtype) -> None:
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    z = {"one image": z[:1], "duplicates": z[:1].repeat(6, 1), "zeros": 0 * z, "large": 30 * z}[kind]
    z = z.to(dtype).requires_grad_()
    terms = VICRegLoss()(z, z.flip(1))
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in terms)
    loss = 10 * terms.invariance + 10 * terms.variance + terms.covariance  # the weights of SIE
    (gradient,) = torch.autograd.grad(loss, z)
    assert bool(gradient.isfinite().all())


def test_autocast_changes_the_terms() -> None:
    z_1, z_2 = views(16, 32)
    expected = VICRegLoss()(z_1, z_2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = VICRegLoss()(z_1, z_2)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_embeddings_of_two_shapes_are_compared() -> None:
    with pytest.raises(ValueError, match=r"expected embeddings of one shape, got \[4, 3\] and \[4, 5\]"):
        VICRegLoss()(torch.zeros(4, 3), torch.zeros(4, 5))
