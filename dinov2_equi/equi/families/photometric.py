"""Families that change values and leave every pixel where it is, or nearly so: colour and blur."""

from __future__ import annotations

import math

from torch import Tensor

from dinov2_equi.data.color import (
    adjust_brightness,
    adjust_contrast_,
    adjust_hue,
    adjust_saturation_,
    blur_each_along,
    gaussian_kernels,
)
from dinov2_equi.equi.families.base import FamilySettings, RangedFamily

_KERNEL_EXTENT = 3.0  # standard deviations: what lies beyond carries 0.3 % of a Gaussian
_CACHED_VALUES = 2**18  # 1 MiB of float32


class PhotometricFamily(RangedFamily):
    """A family of many operations on the same values: a subclass carries them out."""

    def change(self, images: Tensor, theta: Tensor) -> Tensor:
        """Return [b, 3, H, W] for float32 images [b, 3, H, W] and parameters [b, P] on their device."""
        raise NotImplementedError

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `RangedFamily.apply_steps`.

        On a CPU a few images at a time, so that what lies between the operations never leaves the cache: several times
        as fast as the whole batch at once. Elsewhere all of them.
        """
        S, B = theta.shape[:2]
        if images.device.type != "cpu":
            all_at_once = self.change(images.repeat(S, 1, 1, 1), theta.flatten(0, 1))  # [S * B, 3, H, W]
            return all_at_once.reshape(S, *images.shape)
        count = max(1, _CACHED_VALUES // images[:1].numel())
        results = images.new_empty(S, *images.shape)
        for start in range(0, B, count):
            rows = slice(start, start + count)
            for step in range(S):
                results[step, rows] = self.change(images[rows], theta[step, rows])
        return results


class Color(PhotometricFamily):
    """Brightness, contrast, saturation and hue, in this order, each clamped to [0, 1] as in torchvision.

    The parameters are differences: factors are 1 + delta, the hue shift is delta turns.
    """

    param_names: tuple[str, ...] = ("brightness", "contrast", "saturation", "hue_turns")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the ranges from `settings`."""
        high = (settings.max_brightness, settings.max_contrast, settings.max_saturation, settings.max_hue)
        super().__init__([-limit for limit in high], high)

    def change(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `PhotometricFamily.change`."""
        brightness, contrast, saturation, hue = (p[..., None, None, None] for p in theta.unbind(-1))  # [b, 1, 1, 1]
        changed = adjust_brightness(images, 1 + brightness)  # [b, 3, H, W]
        adjust_contrast_(changed, 1 + contrast)
        adjust_saturation_(changed, 1 + saturation)
        return adjust_hue(changed, hue.squeeze(-1))


class Blur(PhotometricFamily):
    """Gaussian blur; the standard deviation grows linearly along the path, and 0 is the identity."""

    param_names: tuple[str, ...] = ("sigma_px",)

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range from `settings`."""
        low, high = settings.blur_sigma_px
        super().__init__((low,), (high,))
        self._radius = math.ceil(_KERNEL_EXTENT * high)

    def change(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `PhotometricFamily.change`; rows, then columns, mirrored at the edges."""
        kernels = gaussian_kernels(theta[:, 0], self._radius)  # [b, K]
        if images.device.type == "cpu":
            kernels = _without_empty_taps(kernels)
        return blur_each_along(blur_each_along(images, kernels, dim=-1), kernels, dim=-2)


def _without_empty_taps(kernels: Tensor) -> Tensor:
    """Return kernels [b, K] without the outer taps that none of them uses."""
    radius = kernels.shape[1] // 2
    num_empty = int((kernels[:, :radius] == 0).all(dim=0).sum())
    return kernels[:, num_empty : kernels.shape[1] - num_empty]
