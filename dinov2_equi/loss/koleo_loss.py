"""Kozachenko-Leonenko regulariser: spread the features of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.distributed.collectives import gather_rows

EPS = 1e-8
MAX_GRADIENT = 1e6
"""A pair whose gradient would be larger has no meaningful direction: its distance is rounding."""
MAX_GRADIENT_FLOAT16 = 1e4
"""The same for float16 features, whose gradients end at 6.5e4."""


class KoLeoLoss(nn.Module):
    """Minus the mean logarithm of each feature's distance to its nearest neighbour in the batch.

    Source: "Spreading vectors for similarity search", Sablayrolles et al. 2019, Equation 2.
    """

    def forward(self, student_output: Tensor) -> Tensor:
        """Return the loss of the features of all ranks, whose neighbours may be on any of them.

        The plain form, on L2-normalised rows::

            mean(-log(min(norm(x[i] - x[j] + eps) for j != i) + eps) for i)

        Computed in float32 whatever the dtype and autocast. Duplicates and zero vectors count with their (finite) value
        but give no gradient: theirs would be around 1e8 in a meaningless direction.

        DINOv2 looks for neighbours on the same GPU alone; so the loss there depends on how many images one has.

        Args:
            student_output: features [B, D] of this rank, not normalised; every rank must have as many.

        Returns:
            A float32 scalar; 0 for fewer than two images, which have no neighbour.
        """
        max_gradient = MAX_GRADIENT_FLOAT16 if student_output.dtype == torch.float16 else MAX_GRADIENT
        with torch.autocast(device_type=student_output.device.type, enabled=False):
            raw = gather_rows(student_output.float())  # [B, D], B of all ranks from here on
            if raw.shape[0] < 2:
                return raw.sum() * 0.0
            features = functional.normalize(raw, dim=-1, eps=EPS)
            neighbors = nearest_neighbors(features.detach())  # [B]
            differences = features - features[neighbors] + EPS  # [B, D]
            with torch.no_grad():
                distances = differences.norm(dim=-1)  # [B]
                norms = raw.norm(dim=-1)
                shorter = torch.minimum(norms, norms[neighbors])
                is_degenerate = distances * shorter < 1.0 / max_gradient
            # The norm's gradient at zero must not be computed at all: NaN times zero is NaN.
            safe = torch.where(is_degenerate.unsqueeze(-1), torch.ones_like(differences), differences)
            used = torch.where(is_degenerate, distances, safe.norm(dim=-1))
            return -(used + EPS).log().mean()


def nearest_neighbors(features: Tensor) -> Tensor:
    """Return for each row of unit vectors [B, D] the index of the most similar other row, [B] int64."""
    similarities = features @ features.T  # [B, B]
    similarities.fill_diagonal_(-torch.inf)
    return similarities.argmax(dim=1)
