"""Measures of class maps, all from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of pixels by true and predicted class.

    Args:
        num_classes: C.
        ignore: true class of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore: int) -> None:
        self.num_classes = num_classes
        self.ignore = ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """[C, C], rows true and columns predicted."""

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of an image.

        Args:
            predicted: integers in [0, C), any shape.
            truth: integers in [0, C) or `ignore`, of the same shape.
        """
        assert predicted.shape == truth.shape
        kept = truth != self.ignore
        pairs = truth[kept].long() * self.num_classes + predicted[kept].long()
        size = self.num_classes**2
        self.counts += torch.bincount(pairs.cpu(), minlength=size).reshape(self.num_classes, -1)

    def iou(self) -> Tensor:
        """Return the intersection over union of each class, float64 [C]; NaN where it is neither true nor predicted."""
        both = self.counts.diagonal().double()
        return both / (self.counts.sum(dim=1) + self.counts.sum(dim=0) - both)

    def results(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the measures.

        Returns:
            miou: mean over the classes that occur, in truth or prediction; pixel_accuracy; mean_accuracy: mean over the
            classes that occur in truth of their share that is found; iou: by name of the class, NaN where it does not
            occur; majority_baseline: miou and pixel_accuracy of the most frequent true class everywhere.

        Raises:
            ValueError: no pixel was counted.
        """
        counts = self.counts.double()
        total, truth = counts.sum(), counts.sum(dim=1)
        if not total:
            raise ValueError("expected at least one pixel with a class, got none; check the label images")
        recall = counts.diagonal() / truth
        share = float(truth.max() / total)
        return {
            "miou": float(self.iou().nanmean()),
            "pixel_accuracy": float(counts.diagonal().sum() / total),
            "mean_accuracy": float(recall.nanmean()),
            "iou": dict(zip(classes, self.iou().tolist(), strict=True)),
            "majority_baseline": {"miou": share / int((truth > 0).sum()), "pixel_accuracy": share},
        }
