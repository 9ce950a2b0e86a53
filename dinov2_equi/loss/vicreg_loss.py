"""Variance, invariance and covariance of two embeddings: self-supervision without prototypes or a teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.distributed.collectives import gather_rows

TARGET_STD = 1.0
"""Standard deviation below which a channel is pushed apart."""

EPS = 1e-4
"""Added to the variance, so that the root of a constant channel has a gradient."""


class VICRegTerms(NamedTuple):
    """The three terms, float32 scalars without weights.

    Attributes:
        invariance: mean squared difference of the embeddings.
        variance: how far the standard deviations of the channels lie below 1, mean over channels and both views.
        covariance: squared covariances of different channels over the number of channels, sum over both views.
    """

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class VICRegLoss(nn.Module):
    """Draw the embeddings of two views together, keep their channels alive and uncorrelated.

    Source: "VICReg: Variance-Invariance-Covariance Regularization", Bardes et al. 2022, equations 1 to 6, with the
    factor 1/2 that its authors' code gives the variance of each view.
    """

    def forward(self, z_1: Tensor, z_2: Tensor) -> VICRegTerms:
        """Return the terms of the embeddings of all ranks.

        The plain form, for each view z [B, D] with columns centred::

            invariance = mean((z_1[b, d] - z_2[b, d]) ** 2)
            variance   = mean over d of max(0, 1 - sqrt(sum(z[b, d] ** 2) / (B - 1) + eps)), mean over the views
            covariance = sum over c != d of (sum(z[b, c] * z[b, d]) / (B - 1)) ** 2 / D, sum over the views

        Computed in float32 whatever the dtype and autocast.

        Args:
            z_1: embeddings of view 1 on this rank, [B, D]; every rank must have as many.
            z_2: the same of view 2.

        Returns:
            The three terms. One image has neither variance nor covariance: both are 0.

        Raises:
            ValueError: if the shapes differ.
        """
        if z_1.shape != z_2.shape:
            raise ValueError(f"expected embeddings of one shape, got {list(z_1.shape)} and {list(z_2.shape)}")
        with torch.autocast(device_type=z_1.device.type, enabled=False):
            views = torch.stack([gather_rows(z_1.float()), gather_rows(z_2.float())])  # [2, B, D], B of all ranks
            invariance = functional.mse_loss(views[0], views[1])
            _, B, D = views.shape
            if B < 2:
                return VICRegTerms(invariance, views.sum() * 0.0, views.sum() * 0.0)
            centred = views - views.mean(dim=1, keepdim=True)
            covariances = centred.transpose(1, 2) @ centred / (B - 1)  # [2, D, D]
            variances = covariances.diagonal(dim1=1, dim2=2)  # [2, D]
            variance = functional.relu(TARGET_STD - (variances + EPS).sqrt()).mean()
            off_diagonal = covariances.square().sum() - variances.square().sum()
            return VICRegTerms(invariance, variance, off_diagonal / D)
