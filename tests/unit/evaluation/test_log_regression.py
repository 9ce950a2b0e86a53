"""Logistic regression: its optimum, both solvers, and that test images choose nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_equi.evaluation.log_regression import fit_log_regression, fit_torch, log_regression, split_by_class

C, F = 3, 8


def make_data(n: int = 240, seed: int = 0, spread: float = 1.0, classes: int = C) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, F, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, F, generator=generator), labels


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, c: float) -> Tensor:
    """Return the objective from its definition, one image at a time, in float64."""
    total = weight.double().square().sum() / 2
    for features, label in zip(x.double(), y.tolist(), strict=True):
        logits = weight.double() @ features + bias.double()
        total = total + c * (logits.logsumexp(0) - logits[label])
    return total


@pytest.mark.parametrize("solver", [fit_log_regression, fit_torch], ids=["scikit-learn", "torch"])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_solution_is_not_where_the_gradient_vanishes(solver: object, c: float) -> None:
    x, y = make_data(60)
    model = solver(x, y, c)  # type: ignore[operator]
    weight, bias = (t.double().requires_grad_() for t in (model.weight, model.bias))
    gradients = torch.autograd.grad(objective(weight, bias, x, y, c), (weight, bias))
    scale = c * len(x)  # the objective is this many times a mean
    assert max(g.abs().max().item() for g in gradients) / scale < 1e-4  # float32 weights


def test_solvers_disagree() -> None:
    x, y = make_data()
    first, second = fit_log_regression(x, y, 1.0), fit_torch(x, y, 1.0)
    torch.testing.assert_close(first.weight, second.weight, rtol=0, atol=2e-3)
    test_x, test_y = make_data(seed=1)
    assert first.accuracy(test_x, test_y) == pytest.approx(second.accuracy(test_x, test_y), abs=0.002)


def test_two_classes_have_one_row_of_weights() -> None:
    x, y = make_data(classes=2)
    model = fit_log_regression(x, y, 1.0)
    assert model.weight.shape == (2, F)
    assert model.accuracy(x, y) == pytest.approx(fit_torch(x, y, 1.0).accuracy(x, y), abs=0.01)


def test_going_on_from_another_solution_ends_elsewhere() -> None:
    x, y = make_data()
    start = fit_log_regression(x, y, 0.01)
    for solver in (fit_log_regression, fit_torch):
        torch.testing.assert_close(solver(x, y, 1.0, start=start).weight, solver(x, y, 1.0).weight, rtol=0, atol=2e-3)


def test_c_is_chosen_by_the_test_images() -> None:
    train, test = make_data(spread=3.0), make_data(60, seed=1, spread=3.0)
    result = log_regression(*train, *test, cs=(1e-4, 1e-2, 1.0))
    turned = log_regression(*train, test[0], (test[1] + 1) % C, cs=(1e-4, 1e-2, 1.0))
    assert (result.c, result.validation) == (turned.c, turned.validation)
    assert result.accuracy > 0.5 > turned.accuracy
    best = max(result.validation.values())
    assert result.c == min(c for c, accuracy in result.validation.items() if accuracy == best)


def test_single_c_is_not_taken_as_it_is() -> None:
    fits: list[int] = []
    result = log_regression(*make_data(), *make_data(seed=1), cs=(0.5,), on_fit=lambda: fits.append(1))
    assert (result.c, result.validation, len(fits)) == (0.5, {}, 1)
    log_regression(*make_data(), *make_data(seed=1), cs=(0.1, 1.0), on_fit=lambda: fits.append(1))
    assert len(fits) == 4


def test_scale_and_offset_of_the_features_matter() -> None:
    (x, y), (test_x, test_y) = make_data(), make_data(seed=1)
    plain = log_regression(x, y, test_x, test_y, cs=(0.1,))
    moved = log_regression(1000 * x + 5, y, 1000 * test_x + 5, test_y, cs=(0.1,))
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.005)
    constant = log_regression(
        torch.cat([x, torch.ones(len(x), 1)], 1), y, torch.cat([test_x, torch.ones(240, 1)], 1), test_y, cs=(0.1,)
    )
    assert constant.accuracy == pytest.approx(plain.accuracy, abs=0.005)


def test_parts_overlap_or_a_class_is_missing_in_one() -> None:
    labels = torch.tensor([0] * 30 + [1] * 2 + [2] * 9)
    kept, held = split_by_class(labels, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(41))
    assert torch.bincount(labels[held]).tolist() == [3, 1, 1]
    assert not torch.equal(held, split_by_class(labels, 0.1, seed=1)[1])


@pytest.mark.parametrize(
    ("labels", "c", "message"),
    [
        ([0, 0, 0], 1.0, "two or more classes"),
        ([0, 2, 2], 1.0, "2 classes up to label 2"),
        ([0, 1, 1], 0.0, "c > 0"),
    ],
)
def test_problem_without_a_solution_is_solved(labels: list[int], c: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_log_regression(torch.randn(3, F), torch.tensor(labels), c)


def test_class_of_one_image_is_held_back() -> None:
    with pytest.raises(ValueError, match="class 1 has 1 image"):
        log_regression(torch.randn(3, F), torch.tensor([0, 0, 1]), torch.randn(1, F), torch.tensor([0]))
