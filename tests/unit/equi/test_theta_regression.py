"""The control that is told theta: its loss, what it sees, and that it can learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.theta_regression import ThetaRegression
from dinov2_equi.equi.tokens import EquiTargets, EquiTokens

Noise = Callable[..., Tensor]

B, N, D_EQUI, NUM_PARAMS = 3, 15, 6, 2
NO_IMAGES = torch.zeros(0, B, 3, 12, 20)


def build() -> ThetaRegression:
    torch.manual_seed(0)
    return ThetaRegression(D_EQUI, NUM_PARAMS, hidden=32)


@pytest.fixture
def tokens(noise: Noise) -> tuple[EquiTokens, EquiTokens]:
    return EquiTokens(noise(B, N, D_EQUI, seed=1)), EquiTokens(noise(B, N, D_EQUI, seed=2))


def targets(noise: Noise, weights: Tensor | None = None) -> EquiTargets:
    return EquiTargets(NO_IMAGES, 2 * noise(B, NUM_PARAMS, seed=3) - 1, weights)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 1.0], [0.5, 2.0, 1.0]])
def test_loss_equals_plain_loops(
    weights: list[float] | None, tokens: tuple[EquiTokens, EquiTokens], noise: Noise
) -> None:
    objective, given = build(), targets(noise, None if weights is None else torch.tensor(weights)[:, None])
    output = objective(*tokens, given)
    pooled = torch.cat([view.patches.mean(dim=1) for view in tokens], dim=-1)
    predictions = objective.layers(pooled)
    total = sum_of_weights = 0.0
    for b in range(B):
        weight = 1.0 if weights is None else weights[b]
        for p in range(NUM_PARAMS):
            total += weight * (predictions[b, p].item() - given.theta[b, p].item()) ** 2
            sum_of_weights += weight
    assert output.loss.item() == pytest.approx(total / sum_of_weights, rel=1e-5)
    assert list(output.metrics) == ["equi/theta_error"]
    assert torch.equal(output.metrics["equi/theta_error"], output.loss)
    assert not output.metrics["equi/theta_error"].requires_grad


def test_without_any_weight_the_loss_is_zero_and_its_gradient_finite(
    tokens: tuple[EquiTokens, EquiTokens], noise: Noise
) -> None:
    objective = build()
    output = objective(*tokens, targets(noise, torch.zeros(B, 1)))
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_class_tokens_take_part_where_there_are_any(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    objective, given = build(), targets(noise)
    with_cls = [EquiTokens(view.patches, noise(B, D_EQUI, seed=7)) for view in tokens]
    changed = [with_cls[0], EquiTokens(with_cls[1].patches, with_cls[1].cls + 1)]  # type: ignore[operator]
    losses = {objective(*views, given).loss.item() for views in (tokens, with_cls, changed)}
    assert len(losses) == 3


def test_gradient_reaches_both_views(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    for view in tokens:
        view.patches.requires_grad_()
    build()(*tokens, targets(noise)).loss.backward()
    for view in tokens:
        assert view.patches.grad is not None
        assert view.patches.grad.abs().amax(dim=-1).min() > 0


def test_loss_is_float32_under_autocast(tokens: tuple[EquiTokens, EquiTokens], noise: Noise) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = build()(*tokens, targets(noise))
    assert output.loss.dtype == torch.float32


def trained_error(is_told: bool) -> float:
    """Return the error on new images of a regression trained on features that contain theta, or noise in its place."""
    torch.manual_seed(0)
    objective = ThetaRegression(4, 2, hidden=64)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[EquiTokens, EquiTokens, EquiTargets]:
        theta = 2 * torch.rand(64, 2, generator=generator) - 1
        source = 2 * torch.rand(64, 1, 2, generator=generator) - 1
        told = theta[:, None] if is_told else 2 * torch.rand(64, 1, 2, generator=generator) - 1
        first = torch.cat([source, source], dim=-1)
        second = torch.cat([source + told, told - source], dim=-1)
        return (
            EquiTokens(first.expand(-1, 3, -1)),
            EquiTokens(second.expand(-1, 3, -1)),
            EquiTargets(torch.zeros(0, 64, 3, 1, 1), theta),
        )

    for _ in range(150):
        optimizer.zero_grad()
        objective(*batch()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(objective(*batch()).loss)


def test_features_that_contain_theta_bring_the_error_to_nothing() -> None:
    # A uniform number in [-1, 1] has a variance of 1/3: the error of who knows nothing.
    assert trained_error(is_told=True) < 0.01
    assert trained_error(is_told=False) > 0.25
