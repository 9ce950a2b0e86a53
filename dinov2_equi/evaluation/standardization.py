"""Features of mean 0 and deviation 1 in every channel, so that one learning rate suits backbones of any scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.evaluation.eval_model import BlockTokens
from dinov2_equi.evaluation.stored_features import StoredFeatures

_CHUNK = 8192
"""Images read from disk at a time."""


@dataclass(frozen=True)
class Standardization:
    """What is taken off the tokens of an image, and what they are divided by."""

    mean: BlockTokens
    """[n, D] of the class tokens and [D] of the mean patch token, float32."""

    std: BlockTokens
    """As `mean`; 1 where a channel is the same in all images."""

    def apply(self, tokens: BlockTokens) -> BlockTokens:
        """Return standardised tokens of a batch on the device of the batch."""
        cls, patch_mean = (
            (values - mean.to(values.device)) / std.to(values.device)
            for values, mean, std in zip(tokens, self.mean, self.std, strict=True)
        )
        return BlockTokens(cls, patch_mean)


def fit_standardization(features: StoredFeatures) -> Standardization:
    """Return mean and deviation of the features of training images, read once and chunk by chunk.

    Sums are kept in float64 and relative to the first image, so that a large mean does not swallow a small deviation.
    """
    origin = [values.double() for values in features.batch(np.arange(1))]
    sums = [torch.zeros_like(values[0]) for values in origin]
    squares = [torch.zeros_like(values[0]) for values in origin]
    for start in range(0, len(features), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(features)))
        for index, values in enumerate(features.batch(rows)):
            shifted = values.double() - origin[index]  # [b, n, D] or [b, D]
            sums[index] += shifted.sum(dim=0)
            squares[index] += shifted.square().sum(dim=0)
    means, deviations = [], []
    for first, total, square in zip(origin, sums, squares, strict=True):
        shift = total / len(features)
        means.append((first[0] + shift).float())
        deviations.append(_deviation(square / len(features) - shift.square()))
    return Standardization(BlockTokens(*means), BlockTokens(*deviations))


def _deviation(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, variance.clamp(min=0).sqrt(), 1.0).float()
