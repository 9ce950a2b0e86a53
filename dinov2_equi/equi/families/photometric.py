"""Families that change values and leave every pixel where it is, or nearly so: colour and blur."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.color import GRAY_WEIGHTS, adjust_hue
from dinov2_equi.equi.families.base import FamilySettings, RangedFamily

_KERNEL_EXTENT = 3.0  # standard deviations: what lies beyond carries 0.3 % of a Gaussian
_LEAST_SIGMA = 1e-3  # pixels: the kernel is a single 1 long before
_LEAST_WEIGHT = 1e-6  # of a tap, the middle one being 1: what lies below changes no thousandth of a level of 255
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
        x = (images * (1 + brightness)).clamp_(0, 1)  # [b, 3, H, W]
        x = _blend_(x, _gray(x).mean(dim=(-2, -1), keepdim=True), contrast)
        x = _blend_(x, _gray(x), saturation)
        return adjust_hue(x, hue.squeeze(-1))


def _gray(images: Tensor) -> Tensor:
    """Return the luma [..., 1, H, W] of images [..., 3, H, W]."""
    red, green, blue = images.split(1, dim=-3)
    of_red, of_green, of_blue = GRAY_WEIGHTS
    luma: Tensor = (red * of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue)
    return luma


def _blend_(images: Tensor, base: Tensor, delta: Tensor) -> Tensor:
    """Move `images` away from `base` by the factor 1 + delta, in place."""
    return images.mul_(1 + delta).sub_(base * delta).clamp_(0, 1)


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
        kernels = self._kernels(theta[:, 0])  # [b, K]
        if images.device.type == "cpu":
            kernels = _without_empty_taps(kernels)
        return _blur_along(_blur_along(images, kernels, dim=-1), kernels, dim=-2)

    def _kernels(self, sigma: Tensor) -> Tensor:
        """Return normalised kernels [b, K] of standard deviations [b]."""
        taps = torch.arange(-self._radius, self._radius + 1, device=sigma.device)
        weights = torch.exp(-0.5 * (taps / sigma.clamp_min(_LEAST_SIGMA)[:, None]).square())
        weights = torch.where(weights < _LEAST_WEIGHT, 0.0, weights)
        return weights / weights.sum(dim=1, keepdim=True)


def _without_empty_taps(kernels: Tensor) -> Tensor:
    """Return kernels [b, K] without the outer taps that none of them uses."""
    radius = kernels.shape[1] // 2
    num_empty = int((kernels[:, :radius] == 0).all(dim=0).sum())
    return kernels[:, num_empty : kernels.shape[1] - num_empty]


def _blur_along(images: Tensor, kernels: Tensor, dim: int) -> Tensor:
    """Return images [b, C, H, W] blurred along one dimension, each by its kernel of [b, K].

    A weighted sum of shifted images: on few channels faster than a convolution, and TF32 has no part in it.
    """
    side, radius = images.shape[dim], kernels.shape[1] // 2
    padding = (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius)
    padded = F.pad(images, padding, mode="reflect")
    weights = kernels[..., None, None, None].unbind(dim=1)  # K of [b, 1, 1, 1]
    blurred = padded.narrow(dim, 0, side) * weights[0]
    for tap, weight in enumerate(weights[1:], start=1):
        blurred.addcmul_(padded.narrow(dim, tap, side), weight)
    return blurred
