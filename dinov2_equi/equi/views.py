"""Second view and reconstruction targets, made from the same crop by one batched resampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dinov2_equi.equi.families import TransformFamily
from dinov2_equi.equi.sampling import TransformPath


@dataclass(frozen=True)
class EquiViews:
    """What the branch makes of the second global crop u.

    Attributes:
        view_2: [B, 3, H, W] float32 in [0, 1], `g_theta(u)`: replaces crop 2 for student and teacher.
        targets: [S, B, 3, H, W] float32 in [0, 1], `g_{k theta / (S + 1)}(u)`, k = 1..S.

    Source: Wang et al. (AAAI-26), Eq. 1.
    """

    view_2: Tensor
    targets: Tensor


def make_views(crops: Tensor, family: TransformFamily, path: TransformPath) -> EquiViews:
    """Return the transformed crops together with the images on the way to them.

    Args:
        crops: [B, 3, H, W] in [0, 1], photometric augmentation done, not normalised, on the training device.
        family: the transform family.
        path: parameters of the B transforms.
    """
    images = family.apply(crops, path.points)  # [S + 1, B, 3, H, W]
    return EquiViews(view_2=images[-1], targets=images[:-1])
