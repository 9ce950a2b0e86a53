"""Logistic regression on frozen features: scikit-learn's L-BFGS on the CPU, torch's on a GPU; no step to tune."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.evaluation.accepted_labels import is_right

DEFAULT_CS = tuple(10.0**exponent for exponent in range(-6, 6))
"""The range of DINOv2's sweep, one value a decade."""

MAX_ITERATIONS = 1000
TOLERANCE = 1e-6
VALIDATION_SHARE = 0.1
"""Share of the training images of each class on which C is chosen."""


@dataclass(frozen=True)
class LinearModel:
    """Logits of features [n, F] are `features @ weight.T + bias`."""

    weight: Tensor
    """[C, F] float32."""

    bias: Tensor
    """[C] float32."""

    def accuracy(self, features: Tensor, labels: Tensor, allowed: Tensor | None = None) -> float:
        """Return the share of features [n, F] with a right answer; `allowed` [C] bool hides other classes.

        Labels are [n] class numbers, or [n, C] bool of the classes that are accepted.
        """
        logits = features.float() @ self.weight.T + self.bias
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return float(is_right(logits.argmax(dim=1), labels).double().mean())


@dataclass(frozen=True)
class LogRegressionResult:
    """What a sweep over C found."""

    c: float
    """The best on held-back training images; the smallest where several are as good."""

    accuracy: float
    """On the test images, after training on all training images with this C; in [0, 1]."""

    validation: dict[float, float]
    """Accuracy on the held-back training images by C; empty where a single C was given."""


def fit_log_regression(features: Tensor, labels: Tensor, c: float, *, start: LinearModel | None = None) -> LinearModel:
    """Return the minimum of `c * sum(cross-entropy) + |weight|^2 / 2`; the bias is free.

    On the CPU by scikit-learn, on a GPU by torch's L-BFGS; both in float64.

    Args:
        features: [n, F]; of about unit variance, or the steps are many.
        labels: [n] integers from 0, each class at least once.
        c: inverse weight of the penalty, positive.
        start: a solution for another `c`, from which to go on.

    Raises:
        ValueError: for fewer than two classes, or a `c` that is not positive.
    """
    num_classes = int(labels.max()) + 1
    if c <= 0 or num_classes < 2 or len(torch.unique(labels)) < num_classes:
        raise ValueError(
            f"expected c > 0 and labels 0..C-1 of two or more classes, got c={c} and "
            f"{len(torch.unique(labels))} classes up to label {num_classes - 1}"
        )
    if features.device.type == "cpu":
        return _fit_sklearn(features, labels, c, start)
    return fit_torch(features, labels, c, start=start)


def _fit_sklearn(features: Tensor, labels: Tensor, c: float, start: LinearModel | None) -> LinearModel:
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    is_binary = int(labels.max()) == 1
    if start is not None and not is_binary:
        model.coef_, model.intercept_ = start.weight.double().numpy(), start.bias.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the value then is as good as a thousand steps make it
        model.fit(features.double().numpy(), labels.numpy())
    weight, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if is_binary:  # one row, for the second class
        weight, bias = (torch.cat([torch.zeros_like(row), row]) for row in (weight, bias))
    return LinearModel(weight, bias)


def fit_torch(features: Tensor, labels: Tensor, c: float, *, start: LinearModel | None = None) -> LinearModel:
    """Return what `fit_log_regression` does, by torch on the device of the features."""
    n, width = features.shape
    num_classes = int(labels.max()) + 1
    x = features.double()  # in float32 the line search ends at the rounding of the objective
    weight, bias = x.new_zeros(num_classes, width), x.new_zeros(num_classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            entropy = F.cross_entropy(F.linear(x, weight, bias), labels)
            loss: Tensor = entropy + weight.square().sum() / (2 * c * n)  # the objective over c * n: of order 1
            torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return LinearModel(weight.detach().float(), bias.detach().float())


def log_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    cs: Sequence[float] = DEFAULT_CS,
    seed: int = 0,
    allowed: Tensor | None = None,
    on_fit: Callable[[], None] | None = None,
) -> LogRegressionResult:
    """Choose C on held-back training images, train on all of them with it, and score the test images.

    Features are standardised with the mean and deviation of the training images. The test images choose nothing.

    Args:
        train_features: [R, F], on the device where to compute.
        train_labels: [R] integers from 0.
        test_features: [n, F].
        test_labels: [n]; a class absent from the training labels is always wrong. Or [n, C] bool, the classes that are
            accepted for each image.
        cs: values to choose from; a single one is taken as it is.
        seed: which training images are held back.
        allowed: [C] bool, the classes that a test image can be of; None: all.
        on_fit: called after each of the `len(cs) + 1` fits (one, for a single C).

    Raises:
        ValueError: for no C, or a class of which there are too few images to hold one back.
    """
    if not cs:
        raise ValueError("expected at least one C, got none")
    mean, std = train_features.float().mean(dim=0), train_features.float().std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    train, test = (train_features.float() - mean) / std, (test_features.float() - mean) / std
    done = on_fit or (lambda: None)
    validation: dict[float, float] = {}
    best = cs[0]
    if len(cs) > 1:
        kept, held = split_by_class(train_labels, VALIDATION_SHARE, seed)
        model = None
        for c in sorted(cs):
            model = fit_log_regression(train[kept], train_labels[kept], c, start=model)
            validation[c] = model.accuracy(train[held], train_labels[held])
            done()
        best = max(validation, key=lambda c: (validation[c], -c))
    model = fit_log_regression(train, train_labels, best)
    done()
    return LogRegressionResult(best, model.accuracy(test, test_labels, allowed), validation)


def split_by_class(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of two parts of [n] labels, the second with `share` of each class and at least one image of it.

    Raises:
        ValueError: for a class of a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().flatten().cpu()
        if len(rows) < 2:
            raise ValueError(
                f"class {label} has {len(rows)} image; to choose C each needs two: give a single C instead"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = max(1, round(share * len(rows)))
        held.append(rows[:count])
        kept.append(rows[count:])
    return torch.cat(kept).to(labels.device), torch.cat(held).to(labels.device)
