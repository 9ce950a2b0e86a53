"""A control: say theta itself, which the branch never tells the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_equi.equi.tokens import EquiOutput, EquiTargets, EquiTokens


class ThetaRegression(nn.Module):
    """A perceptron from the mean equivariant tokens of both views to the parameters of the transform.

    Source: AugSelf (Lee et al. 2021, arXiv 2111.09613), with the drawn parameters as the labels.
    """

    def __init__(self, equi_dim: int, num_params: int, *, hidden: int = 512) -> None:
        """Build the perceptron.

        Args:
            equi_dim: D_equi of one view.
            num_params: P.
            hidden: width of its two hidden layers.
        """
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * equi_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, num_params),
        )

    def forward(self, view_1: EquiTokens, view_2: EquiTokens, targets: EquiTargets) -> EquiOutput:
        """Return the mean squared error of theta as a share of its range, over images and parameters."""
        predictions = self.layers(torch.cat([_pooled(view_1), _pooled(view_2)], dim=-1)).float()  # [B, P]
        errors = (predictions - targets.theta).square()
        loss = errors.mean() if targets.weights is None else _weighted_mean(errors, targets.weights)
        return EquiOutput(loss, {"equi/theta_error": loss.detach()})


def _pooled(view: EquiTokens) -> Tensor:
    """Return [B, D_equi]: the mean of the patch tokens, and of the class token where there is one."""
    patches = view.patches.mean(dim=1)
    return patches if view.cls is None else (patches + view.cls) / 2


def _weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of errors [B, P] over the images with weights [B, 1]; 0 where all weights are."""
    return (errors * weights).sum() / (weights.sum() * errors.shape[1]).clamp_min(torch.finfo(errors.dtype).tiny)
