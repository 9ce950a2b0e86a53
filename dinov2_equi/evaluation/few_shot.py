"""Classification from a few labelled images of each class, repeated over draws of these images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.evaluation.log_regression import fit_log_regression

DEFAULT_SHOTS = (1, 2, 4, 8, 16)
FEW_SHOT_C = 1.0
"""Weight of the labels against the penalty; a few images leave none over to choose it by."""


def few_shot(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = DEFAULT_SHOTS,
    num_draws: int = 5,
    seed: int = 0,
) -> dict[int, dict[str, list[float]]]:
    """Return the accuracies in [0, 1] of each draw, by number of images a class and by classifier.

    `class_mean`: the class whose mean of L2-normalised features is nearest by cosine. `log_regression`: on the same
    features, scaled to unit variance.

    Args:
        train_features: [R, F], of which the labelled images are drawn.
        train_labels: [R] integers from 0, each class at least `max(shots)` times.
        test_features: [n, F].
        test_labels: [n].
        shots: images of each class.
        num_draws: draws of images; draw i of k images is part of draw i of more.
        seed: fixes the draws.

    Raises:
        ValueError: for a class with fewer images than a draw needs.
    """
    counts = torch.bincount(train_labels)
    if not shots or min(shots) < 1 or num_draws < 1 or int(counts.min()) < max(shots):
        raise ValueError(
            f"expected shots from 1 to {int(counts.min())}, the images of the smallest class, and at least one draw; "
            f"got {list(shots)} and {num_draws}"
        )
    train, test = (_unit_variance(features) for features in (train_features, test_features))
    results: dict[int, dict[str, list[float]]] = {k: {"class_mean": [], "log_regression": []} for k in shots}
    for draw in range(num_draws):
        order = _shuffled_by_class(train_labels, seed, draw)  # [classes, max(shots)] at least
        for k in shots:
            rows = torch.cat([of_class[:k] for of_class in order])
            x, y = train[rows], train_labels[rows]
            results[k]["class_mean"].append(_class_mean_accuracy(x, y, test, test_labels))
            model = fit_log_regression(x, y, FEW_SHOT_C)
            results[k]["log_regression"].append(model.accuracy(test, test_labels))
    return results


def _unit_variance(features: Tensor) -> Tensor:
    """Return L2-normalised features [n, F], times the root of F."""
    return F.normalize(features.float(), dim=1).mul(math.sqrt(features.shape[1]))


def _shuffled_by_class(labels: Tensor, seed: int, draw: int) -> list[Tensor]:
    """Return the rows of each class in random order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    rows = ((labels == label).nonzero().flatten() for label in torch.unique(labels).tolist())
    return [of_class[torch.randperm(len(of_class), generator=generator).to(of_class.device)] for of_class in rows]


def _class_mean_accuracy(x: Tensor, y: Tensor, test: Tensor, test_labels: Tensor) -> float:
    means = torch.stack([x[y == label].mean(dim=0) for label in torch.unique(y).tolist()])  # [C, F]
    nearest = (test @ F.normalize(means, dim=1).T).argmax(dim=1)
    return float((torch.unique(y)[nearest] == test_labels).double().mean())
