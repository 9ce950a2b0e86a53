"""The transformation path: drawn parameters and the points between the identity and them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.equi.families import TransformFamily


@dataclass(frozen=True)
class TransformPath:
    """S intermediate points of a path from the identity to theta, and its end.

    Attributes:
        theta: [B, P] drawn parameters, the end of the path.
        intermediates: [S, B, P] parameters `k * theta / (S + 1)`, k = 1..S.

    Source: Wang et al. (AAAI-26), Eq. 1.
    """

    theta: Tensor
    intermediates: Tensor

    @property
    def points(self) -> Tensor:
        """All parameters [S + 1, B, P], the end last."""
        return torch.cat([self.intermediates, self.theta.unsqueeze(0)])


def draw_theta(family: TransformFamily, positions: Tensor, seed: int) -> Tensor:
    """Return one transform [B, P] for each sample, a pure function of (seed, sample position).

    So a resumed run, or one with other batch or process counts, meets the same transforms.

    Args:
        family: what to draw from.
        positions: [B] int64 sample positions.
        seed: seed of the run.
    """
    draws = []
    for position in positions.tolist():
        state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
        draws.append(family.draw(1, torch.Generator().manual_seed(int(state[0]))))
    return torch.cat(draws)


def make_path(family: TransformFamily, theta: Tensor, num_steps: int) -> TransformPath:
    """Return the path to `theta` [B, P] with `num_steps` (S >= 1) intermediate points.

    Raises:
        ValueError: if `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"the path needs at least one intermediate image, got num_steps={num_steps}")
    fractions = [k / (num_steps + 1) for k in range(1, num_steps + 1)]
    return TransformPath(theta, torch.stack([family.scale(theta, f) for f in fractions]))
