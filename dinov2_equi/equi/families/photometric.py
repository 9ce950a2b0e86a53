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


class Color(RangedFamily):
    """Brightness, contrast, saturation and hue, in this order, each clamped to [0, 1] as in torchvision.

    The parameters are differences: factors are 1 + delta, the hue shift is delta turns.
    """

    param_names: tuple[str, ...] = ("brightness", "contrast", "saturation", "hue_turns")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the ranges from `settings`."""
        high = (settings.max_brightness, settings.max_contrast, settings.max_saturation, settings.max_hue)
        super().__init__([-limit for limit in high], high)

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `RangedFamily.apply_steps`."""
        brightness, contrast, saturation, hue = (p[..., None, None, None] for p in theta.unbind(-1))  # [S, B, 1, 1, 1]
        x = (images * (1 + brightness)).clamp(0, 1)  # [S, B, 3, H, W]
        x = _blend(x, _gray(x).mean(dim=(-2, -1), keepdim=True), contrast)
        x = _blend(x, _gray(x), saturation)
        return adjust_hue(x, hue.squeeze(-1))


def _gray(images: Tensor) -> Tensor:
    """Return the luma [..., 1, H, W] of images [..., 3, H, W]."""
    weights = torch.tensor(GRAY_WEIGHTS, device=images.device)
    return (images * weights[:, None, None]).sum(dim=-3, keepdim=True)


def _blend(images: Tensor, base: Tensor, delta: Tensor) -> Tensor:
    """Return `images`, moved away from `base` by the factor 1 + delta."""
    return (images + delta * (images - base)).clamp(0, 1)


class Blur(RangedFamily):
    """Gaussian blur; the standard deviation grows linearly along the path, and 0 is the identity."""

    param_names: tuple[str, ...] = ("sigma_px",)

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range from `settings`."""
        low, high = settings.blur_sigma_px
        super().__init__((low,), (high,))
        self._radius = math.ceil(_KERNEL_EXTENT * high)

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `RangedFamily.apply_steps`; rows, then columns, mirrored at the edges."""
        B, C, H, W = images.shape
        S = theta.shape[0]
        rows = images.flatten(0, 1).unsqueeze(0)  # [1, B * C, H, W]
        kernels = self._kernels(theta[..., 0]).transpose(0, 1)  # [B, S, K]
        kernels = kernels[:, None].expand(B, C, S, -1).flatten(0, 2)  # [B * C * S, K]
        rows = _convolve(rows, kernels[:, None, None, :], groups=B * C)  # [1, B * C * S, H, W]
        blurred = _convolve(rows, kernels[:, None, :, None], groups=B * C * S)
        return blurred.reshape(B, C, S, H, W).permute(2, 0, 1, 3, 4)

    def _kernels(self, sigma: Tensor) -> Tensor:
        """Return normalised kernels [..., K] of standard deviations [...]."""
        taps = torch.arange(-self._radius, self._radius + 1, device=sigma.device)
        weights = torch.exp(-0.5 * (taps / sigma.clamp_min(_LEAST_SIGMA)[..., None]).square())
        return weights / weights.sum(dim=-1, keepdim=True)


def _convolve(images: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """Return images of the same size, each channel mirrored at the edges and convolved on its own, in float32."""
    height, width = (side // 2 for side in kernels.shape[-2:])
    with torch.autocast(device_type=images.device.type, enabled=False):
        return F.conv2d(F.pad(images, (width, width, height, height), mode="reflect"), kernels, groups=groups)
