"""Second view and the path towards it, made from the same crop by one batched call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dinov2_equi.equi.families.base import TransformFamily
from dinov2_equi.equi.sampling import path_points


@dataclass(frozen=True)
class EquiViews:
    """What the branch makes of the second global crop u.

    Attributes:
        view_2: [B, 3, H, W] float32 in [0, 1], `g_theta(u)`: replaces crop 2 for student and teacher.
        path: [S, B, 3, H, W] float32 in [0, 1], `g_{k theta / (S + 1)}(u)`, k = 1..S, and `view_2` last where the end
            is included; S = 0 where no image of the path is wanted.
        theta: [B, P] parameters of the transforms, on the CPU. No network is told them, except in the control
            that regresses them.

    Source: Wang et al. (AAAI-26), Eq. 1.
    """

    view_2: Tensor
    path: Tensor
    theta: Tensor


def make_views(
    crops: Tensor, family: TransformFamily, theta: Tensor, num_steps: int, *, include_final: bool = False
) -> EquiViews:
    """Return the transformed crops together with the images on the way to them.

    Args:
        crops: [B, 3, H, W] in [0, 1], photometric augmentation done, not normalised, on the training device.
        family: the transform family.
        theta: [B, P] parameters of the B transforms.
        num_steps: S, intermediate images; 0 makes the second view alone.
        include_final: count the second view among the images of the path.
    """
    images = family.apply(crops, path_points(family, theta, num_steps))  # [S + 1, B, 3, H, W]
    return EquiViews(images[-1], images if include_final else images[:-1], theta)
