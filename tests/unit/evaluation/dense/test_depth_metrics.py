"""Measures and losses of depth against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinov2_equi.evaluation.dense.depth_metrics import (
    METRICS,
    MeanOfImages,
    bins_loss,
    depth_metrics,
    gradient_loss,
    silog_loss,
)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, truth = torch.rand(2, 5, 7, generator=generator) * 4 + 0.5
    return prediction, truth, torch.rand(5, 7, generator=generator) > 0.3


def by_loop(prediction: np.ndarray, truth: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    pairs = [(float(p), float(t)) for p, t, m in zip(prediction.flat, truth.flat, measured.flat, strict=True) if m]
    n = len(pairs)
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    mean_log = sum(logs) / n
    found = {
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "rmse_log": math.sqrt(sum(g * g for g in logs) / n),
        "silog": 100 * math.sqrt(sum((g - mean_log) ** 2 for g in logs) / n),
    }
    for power in (1, 2, 3):
        found[f"delta{power}"] = sum(max(p / t, t / p) < 1.25**power for p, t in pairs) / n
    return found


@pytest.mark.parametrize("seed", range(3))
def test_measure_differs_from_a_plain_loop(seed: int) -> None:
    prediction, truth, measured = drawn(seed)
    found = depth_metrics(prediction, truth, measured)
    wanted = by_loop(prediction.numpy(), truth.numpy(), measured.numpy())
    assert tuple(found) == METRICS
    assert found == pytest.approx(wanted, rel=1e-12)  # both in double precision


def test_measures_of_a_case_done_by_hand() -> None:
    prediction, truth = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 4.0, 2.0]])
    found = depth_metrics(prediction, truth, torch.ones(1, 3, dtype=torch.bool))
    assert found["rmse"] == pytest.approx(math.sqrt(8 / 3))
    assert found["abs_rel"] == pytest.approx(0.5)
    assert found["log10"] == pytest.approx(2 * math.log10(2) / 3)
    assert found["delta1"] == found["delta3"] == pytest.approx(1 / 3)  # a factor of 2 lies above 1.25 cubed


def test_perfect_prediction_has_an_error_and_a_common_factor_a_silog() -> None:
    _, truth, measured = drawn()
    perfect = depth_metrics(truth, truth, measured)
    assert all(perfect[name] == (1.0 if name.startswith("delta") else 0.0) for name in METRICS)
    # 1e-5 of a per cent: float32 rounds the factor away from exactly 3
    assert depth_metrics(3 * truth, truth, measured)["silog"] == pytest.approx(0, abs=1e-5)


def test_pixels_that_are_not_measured_count() -> None:
    prediction, truth, measured = drawn()
    spoilt = torch.where(measured, prediction, torch.tensor(99.0))
    assert depth_metrics(spoilt, truth, measured) == depth_metrics(prediction, truth, measured)
    with pytest.raises(ValueError, match="at least one pixel"):
        depth_metrics(prediction, truth, torch.zeros_like(measured))


def test_mean_over_images_weighs_their_pixels() -> None:
    mean = MeanOfImages("0.png")
    first, second = (depth_metrics(*drawn(seed)) for seed in (0, 1))
    mean.add(first)
    mean.add(second)
    wanted = {name: (first[name] + second[name]) / 2 for name in METRICS} | {"num_images": 2}
    assert mean.result() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="got none, 0.png the first of them"):
        MeanOfImages("0.png").result()


@pytest.mark.parametrize("focus", [0.0, 0.5, 0.85])
def test_scale_invariant_loss_differs_from_a_plain_loop(focus: float) -> None:
    prediction, truth, known = drawn()
    g = [math.log(p) - math.log(t) for p, t in zip(prediction[known].tolist(), truth[known].tolist(), strict=True)]
    wanted = math.sqrt(sum(x * x for x in g) / len(g) - focus * (sum(g) / len(g)) ** 2)
    assert float(silog_loss(prediction, truth, known, focus)) == pytest.approx(wanted, rel=1e-5)  # float32


def test_scale_invariant_loss_has_an_infinite_gradient_at_its_minimum() -> None:
    _, truth, known = drawn()
    prediction = truth.clone().requires_grad_()
    silog_loss(prediction, truth, known).backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    prediction.grad = None
    silog_loss(prediction, truth, torch.zeros_like(known)).backward()  # an image without any depth
    assert prediction.grad is not None and not prediction.grad.any()


def test_loss_of_bins_differs_from_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2, 5, 3, 4, generator=generator).softmax(dim=1)
    truth = torch.rand(2, 1, 3, 4, generator=generator) * 4 + 1
    known = torch.rand(2, 1, 3, 4, generator=generator) > 0.3
    centres = torch.linspace(1, 5, 5)
    costs = []
    for b, y, x in np.ndindex(2, 3, 4):
        if known[b, 0, y, x]:
            weights = [max(0.0, 1 - abs(float(truth[b, 0, y, x]) - float(c))) for c in centres]
            costs.append(-sum(w * math.log(float(shares[b, k, y, x])) for k, w in enumerate(weights)))
    found = float(bins_loss(shares, centres, truth, known))
    assert found == pytest.approx(sum(costs) / len(costs), rel=1e-5)  # float32


@pytest.mark.parametrize("depth", [1.0, 5.0, 0.2, 9.0])
def test_depth_at_or_beyond_the_last_bin_has_no_loss(depth: float) -> None:
    shares = torch.full((1, 5, 1, 1), 0.2)
    loss = bins_loss(shares, torch.linspace(1, 5, 5), torch.full((1, 1, 1, 1), depth), torch.ones(1, 1, 1, 1) > 0)
    assert float(loss) == pytest.approx(math.log(5), rel=1e-5)  # float32


def gradients_by_loop(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray) -> float:
    """Return the loss of images [B, H, W] from its description."""
    total = 0.0
    for step in (1, 2, 4, 6):
        rows, columns = range(0, truth.shape[1], step), range(0, truth.shape[2], step)
        slopes, count = 0.0, 0
        for b in range(len(truth)):
            for i, y in enumerate(rows):
                for j, x in enumerate(columns):
                    count += int(known[b, y, x])
                    for other in ((i + 2, j), (i, j + 2)):
                        if other[0] >= len(rows) or other[1] >= len(columns):
                            continue
                        v, u = rows[other[0]], columns[other[1]]
                        if known[b, y, x] and known[b, v, u]:
                            g = math.log(prediction[b, y, x] / truth[b, y, x])
                            slopes += abs(math.log(prediction[b, v, u] / truth[b, v, u]) - g)
        total += slopes / count
    return total


def test_loss_of_slopes_differs_from_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, truth = torch.rand(2, 2, 1, 19, 23, generator=generator) * 4 + 0.5
    known = torch.rand(2, 1, 19, 23, generator=generator) > 0.3
    wanted = gradients_by_loop(*(values[:, 0].numpy() for values in (prediction, truth, known)))
    assert float(gradient_loss(prediction, truth, known)) == pytest.approx(wanted, rel=1e-5)  # float32


def test_loss_of_slopes_knows_the_scale_or_the_unknown_pixels() -> None:
    _, truth, known = (values[None, None] for values in drawn())
    prediction = (3 * truth).requires_grad_()
    # 1e-5: float32 rounds the factor away from exactly 3
    assert float(gradient_loss(prediction, truth, known).detach()) == pytest.approx(0, abs=1e-5)
    hidden = torch.where(known, truth, 0.0)
    loss = gradient_loss(prediction, hidden, known)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    assert float(gradient_loss(prediction, truth, torch.zeros_like(known)).detach()) == 0
