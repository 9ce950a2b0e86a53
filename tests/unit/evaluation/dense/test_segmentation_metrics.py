"""mIoU against a plain loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinov2_equi.evaluation.dense.segmentation_metrics import ConfusionMatrix

C = 5


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C - 1, (2, 6, 7))  # the last class does not occur
    truth[rng.random(truth.shape) < 0.2] = 255
    predicted = rng.integers(0, C - 1 if seed else C, (2, 6, 7))
    return torch.from_numpy(predicted), torch.from_numpy(truth)


def by_loop(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    ious, recalls = [], []
    for c in range(C):
        both = either = of_class = 0
        for p, t in zip(predicted.flat, truth.flat, strict=True):
            if t == 255:
                continue
            both += p == c and t == c
            either += p == c or t == c
            of_class += t == c
        ious.append(both / either if either else math.nan)
        recalls.append(both / of_class if of_class else math.nan)
    kept = truth != 255
    found = {"miou": np.nanmean(ious), "mean_accuracy": np.nanmean(recalls)}
    return found | {"pixel_accuracy": (predicted == truth)[kept].mean()}


@pytest.mark.parametrize("seed", range(3))
def test_measure_differs_from_a_plain_loop(seed: int) -> None:
    predicted, truth = drawn(seed)
    matrix = ConfusionMatrix(C, 255)
    for p, t in zip(predicted, truth, strict=True):
        matrix.add(p, t)
    found = matrix.results([str(c) for c in range(C)])
    wanted = by_loop(predicted.numpy(), truth.numpy())
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)  # both in double precision
    assert math.isnan(found["iou"]["4"]) == (seed > 0)  # neither true nor predicted, unless predicted in vain


def test_majority_baseline_differs_from_predicting_that_class() -> None:
    _, truth = drawn(1)
    kept = truth[truth != 255]
    most = int(kept.bincount().argmax())
    matrix, constant = ConfusionMatrix(C, 255), ConfusionMatrix(C, 255)
    matrix.add(drawn(1)[0], truth)
    constant.add(torch.full_like(truth, most), truth)
    wanted = constant.results([str(c) for c in range(C)])
    found = matrix.results([str(c) for c in range(C)])["majority_baseline"]
    assert found == pytest.approx({name: wanted[name] for name in ("miou", "pixel_accuracy")})


def test_perfect_and_empty_maps() -> None:
    _, truth = drawn(1)
    matrix = ConfusionMatrix(C, 255)
    with pytest.raises(ValueError, match="at least one pixel with a class"):
        matrix.results([str(c) for c in range(C)])
    matrix.add(torch.where(truth == 255, 0, truth), truth)
    found = matrix.results([str(c) for c in range(C)])
    assert found["miou"] == found["pixel_accuracy"] == found["mean_accuracy"] == 1.0
