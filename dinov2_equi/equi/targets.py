"""What the decoder has to draw: the path of the paper, and the controls that tell what the path is good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dinov2_equi.equi.views import EquiViews

Images = Callable[[Tensor, Tensor, EquiViews], Tensor]
"""(crop 1 [B, 3, H, W], crop 2 before the transform [B, 3, H, W], views) -> images [S, B, 3, H, W]."""


@dataclass(frozen=True)
class Target:
    """One choice of images to reconstruct.

    Attributes:
        images: makes them.
        is_path: the images lie on the path, S of them; else there is one.
        view_1_alone: the decoder is given the tokens of view 1 twice, instead of both views.
        masked_alone: only the patches that were hidden from the student count.
        is_theta: the parameters are wanted, not images.
    """

    images: Images
    is_path: bool = False
    view_1_alone: bool = False
    masked_alone: bool = False
    is_theta: bool = False

    def num_images(self, num_steps: int, *, include_final: bool) -> int:
        """Return S, the number of images drawn for a path of `num_steps` intermediates."""
        return num_steps + include_final if self.is_path else 1


TARGETS: dict[str, Target] = {
    "path": Target(lambda crop_1, crop_2, views: views.path, is_path=True),
    "untransformed": Target(lambda crop_1, crop_2, views: crop_2.float().unsqueeze(0)),
    "view_2": Target(lambda crop_1, crop_2, views: views.view_2.unsqueeze(0)),
    "view_1": Target(lambda crop_1, crop_2, views: crop_1.float().unsqueeze(0)),
    "masked": Target(lambda crop_1, crop_2, views: crop_1.float().unsqueeze(0), view_1_alone=True, masked_alone=True),
    "theta": Target(lambda crop_1, crop_2, views: views.path, is_theta=True),
}
"""The choices of `equi.target`.

* `path`: the images between the views (Wang et al., AAAI-26).
* `untransformed`, `view_2`: the two ends of the path.
* `view_1`: the other view, as the predecessor does (Cross Attention Reconstruction, arXiv 2412.03314).
* `masked`: hidden patches of the plain view from its visible ones (MAE, arXiv 2111.06377).
* `theta`: no image but the parameters of the transform (AugSelf, arXiv 2111.09613).
"""
