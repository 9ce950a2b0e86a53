"""What is random about the branch: drawn parameters and the path to them, and the patches that are drawn in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_equi.data.samplers import RandomStream, random_uniforms
from dinov2_equi.equi.families.base import TransformFamily


def draw_theta(family: TransformFamily, positions: Tensor, seed: int) -> Tensor:
    """Return one transform [B, P] for each sample, a pure function of (seed, sample position).

    So a resumed run, or one with other batch or process counts, meets the same transforms.

    Args:
        family: what to draw from.
        positions: [B] int64 sample positions.
        seed: seed of the run.
    """
    return family.from_unit(random_uniforms(RandomStream.THETA, seed, positions, family.num_uniforms))


def draw_patches(positions: Tensor, seed: int, *, num_patches: int, count: int) -> Tensor:
    """Return the patches to reconstruct of each sample, [B, n] int64 on the CPU, without repetition.

    A pure function of (seed, sample position), as `draw_theta`: the random state of the process, which draws the
    stochastic depth of the same step, is not touched.

    Args:
        positions: [B] int64 sample positions.
        seed: seed of the run.
        num_patches: N, patches of an image.
        count: n, how many of them.
    """
    ranks = random_uniforms(RandomStream.PATCHES, seed, positions, num_patches)  # [B, N]
    return ranks.argsort(dim=1, stable=True)[:, :count]


def path_points(family: TransformFamily, theta: Tensor, num_steps: int) -> Tensor:
    """Return the points `k * theta / (S + 1)`, k = 1..S + 1, of the path to `theta`: [S + 1, B, P], the end last.

    Args:
        family: knows what a part of its parameters is.
        theta: [B, P] parameters of the whole transform.
        num_steps: S, number of intermediate points.

    Raises:
        ValueError: if `num_steps` is negative.

    Source: Wang et al. (AAAI-26), Eq. 1.
    """
    if num_steps < 0:
        raise ValueError(f"expected num_steps >= 0, got {num_steps}")
    parts = [family.scale(theta, k / (num_steps + 1)) for k in range(1, num_steps + 1)]
    return torch.stack([*parts, theta])
