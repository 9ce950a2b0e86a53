"""Names and values of the branch's log figures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.metrics import effective_rank, feature_metrics, gradient_ratio, psnr, reconstruction_metrics

Noise = Callable[..., Tensor]

# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("error", "decibel"), [(1.0, 0.0), (0.01, 20.0), (0.25, 6.0206), (1e-4, 40.0)])
def test_psnr_equals_its_definition(error: float, decibel: float) -> None:
    assert psnr(torch.tensor(error)).item() == pytest.approx(decibel, abs=1e-3)  # float32 logarithm, times 10


def test_psnr_of_a_perfect_image_is_finite() -> None:
    assert psnr(torch.tensor(0.0)).item() == pytest.approx(100.0)


def test_psnr_of_a_broken_image_stays_broken() -> None:
    assert math.isnan(psnr(torch.tensor(math.nan)).item())


def test_steps_are_counted_from_one() -> None:
    metrics = reconstruction_metrics(torch.tensor([0.01, 0.25]))
    assert {name: round(value.item(), 3) for name, value in metrics.items()} == {
        "equi/error_step_1": 0.01,
        "equi/error_step_2": 0.25,
        "equi/psnr_step_1": 20.0,
        "equi/psnr_step_2": 6.021,
    }


def test_metrics_are_detached() -> None:
    errors = torch.tensor([0.01, 0.25], requires_grad=True)
    assert not any(value.requires_grad for value in reconstruction_metrics(errors * 2).values())


# ------------------------------------------------------------------------------------------------------------- features


def rank_by_numpy(tokens: Tensor) -> float:
    """Return exp(entropy) of the eigenvalues of the covariance, from the singular values of the centred tokens."""
    x = tokens.double().numpy()
    variances = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    shares = variances / variances.sum()
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def uneven(noise: Noise, rows: int, width: int, seed: int) -> Tensor:
    """Return tokens whose channels depend on each other, far from the origin."""
    mixing = noise(width, width, seed=seed) ** 4
    return (noise(rows, width, seed=seed + 1) - 0.5) @ mixing * torch.linspace(0.1, 3, width) + 5


@pytest.mark.parametrize("rows", [40, 6])  # fewer rows than channels: some eigenvalues are 0
def test_feature_metrics_equal_numpy(rows: int, noise: Noise) -> None:
    invariant, equivariant = uneven(noise, rows, 9, seed=1), uneven(noise, rows, 7, seed=3)
    metrics = feature_metrics(invariant, equivariant)
    assert set(metrics) == {"equi/variance_share", "equi/rank_invariant", "equi/rank_equivariant"}
    variances = [float(part.double().numpy().var(axis=0).sum()) for part in (invariant, equivariant)]
    # float32 eigenvalues; their entropy is the sum of up to 9 terms
    assert metrics["equi/variance_share"].item() == pytest.approx(variances[1] / sum(variances), rel=1e-4)
    assert metrics["equi/rank_invariant"].item() == pytest.approx(rank_by_numpy(invariant), rel=1e-3)
    assert metrics["equi/rank_equivariant"].item() == pytest.approx(rank_by_numpy(equivariant), rel=1e-3)


def test_variance_share_at_its_ends(noise: Noise) -> None:
    moving, still = noise(20, 4), torch.full((20, 4), 3.0)
    assert feature_metrics(moving, still)["equi/variance_share"].item() == pytest.approx(0, abs=1e-6)
    assert feature_metrics(still, moving)["equi/variance_share"].item() == pytest.approx(1, abs=1e-6)
    assert feature_metrics(moving, moving)["equi/variance_share"].item() == pytest.approx(0.5)


def test_collapsed_features_have_finite_metrics() -> None:
    metrics = feature_metrics(torch.zeros(20, 4), torch.zeros(20, 4))
    assert metrics["equi/variance_share"].item() == 0
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([1.0, 1.0, 1.0, 1.0], 4.0), ([2.0, 2.0, 0.0, 0.0], 2.0), ([7.0, 0.0], 1.0), ([0.5, 0.25, 0.25], 2**1.5)],
)
def test_effective_rank_of_a_known_spectrum(spectrum: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(spectrum)).item() == pytest.approx(rank, rel=1e-5)
    assert effective_rank(1e-6 * torch.tensor(spectrum)).item() == pytest.approx(rank, rel=1e-5)  # scale is nothing


def test_rank_of_features_in_a_line_is_one(noise: Noise) -> None:
    line = noise(30, 1) * torch.tensor([[1.0, -2.0, 3.0]])
    assert feature_metrics(line, line)["equi/rank_invariant"].item() == pytest.approx(1, abs=0.01)  # rounding above 0


def test_broken_features_give_broken_metrics_and_no_error(noise: Noise) -> None:
    # Eigenvalue routines raise on NaN; the guard of the training step is to name the metric instead.
    broken = noise(20, 4)
    broken[3, 2] = math.nan
    metrics = feature_metrics(broken, noise(20, 4))
    assert metrics["equi/rank_invariant"].isnan()
    assert metrics["equi/variance_share"].isnan()
    assert metrics["equi/rank_equivariant"].isfinite()


def test_feature_metrics_are_float32_under_autocast_and_detached(noise: Noise) -> None:
    invariant, equivariant = uneven(noise, 40, 9, seed=1).requires_grad_(), uneven(noise, 40, 7, seed=3)
    plain = feature_metrics(invariant, equivariant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = feature_metrics(invariant, equivariant)
    for name, value in mixed.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert torch.equal(value, plain[name])


# ------------------------------------------------------------------------------------------------------------ gradients


def two_losses(noise: Noise) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Return two losses, features on the way to them of which one is no part of the first loss, and the weight."""
    weight = noise(4, 4).requires_grad_()
    first, second = noise(3, 4, seed=1) @ weight, noise(2, 4, seed=2) @ weight
    return first.cos().sum(), (first**2).sum() + (second**3).sum(), [first, second], weight


def norm(tensors: tuple[Tensor | None, ...]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors if t is not None))


def test_gradient_ratio_equals_two_backward_passes(noise: Noise) -> None:
    loss, other, features, _ = two_losses(noise)
    norms = [norm(torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)) for term in (loss, other)]
    assert gradient_ratio(loss, other, features).item() == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert gradient_ratio(other, loss, features).item() == pytest.approx(norms[1] / norms[0], rel=1e-5)
    assert gradient_ratio(3 * loss, other, features).item() == pytest.approx(3 * norms[0] / norms[1], rel=1e-5)


def test_gradient_ratio_keeps_the_graph_and_leaves_no_gradient(noise: Noise) -> None:
    loss, other, features, weight = two_losses(noise)
    ratio = gradient_ratio(loss, other, features)
    assert not ratio.requires_grad
    assert weight.grad is None
    (loss + other).backward()  # the graph is still there
    untouched = two_losses(noise)
    (untouched[0] + untouched[1]).backward()
    assert weight.grad is not None
    assert untouched[3].grad is not None
    assert torch.equal(weight.grad, untouched[3].grad)


def test_gradient_ratio_of_losses_that_do_not_pull_is_zero(noise: Noise) -> None:
    loss, _, features, _ = two_losses(noise)
    assert gradient_ratio(0 * loss, 0 * loss, features).item() == 0
    assert gradient_ratio(0 * loss, loss, features).item() == 0
    elsewhere = noise(3).requires_grad_().sum()
    assert gradient_ratio(elsewhere, loss, features).item() == 0
