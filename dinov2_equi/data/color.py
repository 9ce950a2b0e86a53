"""Colour operations of whole batches and of the photometric families; `crop_pixels` has those of one crop.

All give torchvision's values up to rounding; the tests compare them. Hue and blur, the costly ones, are two to four
times as fast as torchvision's on small crops. Names that end in an underscore change their argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the luma, as torchvision rounds those of ITU-R BT.601."""

_RGB = 3
_LEAST_SIGMA = 1e-3  # pixels: the kernel is a single 1 long before
_LEAST_WEIGHT = 1e-6  # of a tap, the middle one being 1


def adjust_hue(image: Tensor, hue_shift: float | Tensor) -> Tensor:
    """Return images with their hue turned.

    In HSV with value V, chroma C = V - min(R, G, B) and hue h in sixths of a turn, channel n is
    V - C * clamp(min(k, 4 - k), 0, 1), where k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue.

    Args:
        image: float32 [..., 3, H, W] in [0, 1].
        hue_shift: In turns, [-0.5, 0.5]; a number, or a tensor that broadcasts with [..., H, W].
    """
    red, green, blue = image.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = chroma.clamp_min(1e-12).reciprocal_()  # grey pixels: the differences below are 0 too
    hue = torch.where(
        value == red,
        (green - blue).mul_(inverse),
        torch.where(value == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )
    channel = torch.tensor([5.0, 3.0, 1.0], device=image.device).view(3, 1, 1)
    sector = hue.add_(6 * hue_shift).unsqueeze(-3) + channel  # [..., 3, H, W]
    sector -= 6 * (sector / 6).floor_()  # `remainder_` is slower
    weight = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return value.unsqueeze(-3) - weight.mul_(chroma.unsqueeze(-3))


def luma(images: Tensor) -> Tensor:
    """Return the luma [..., 1, H, W] of images, float32 [..., 3, H, W]."""
    red, green, blue = images.split(1, dim=-3)
    of_red, of_green, of_blue = GRAY_WEIGHTS
    gray: Tensor = (red * of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue)
    return gray


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Return images [b, C, H, W] times factors >= 0, [b, 1, 1, 1], clamped to [0, 1]."""
    return (images * factors).clamp_(0, 1)


def adjust_contrast_(images: Tensor, factors: Tensor) -> Tensor:
    """Move images [b, C, H, W] away from their mean by factors >= 0, [b, 1, 1, 1]; clamped to [0, 1].

    The mean is that of the luma where there are three channels, else each channel's own.
    """
    level = luma(images) if images.shape[1] == _RGB else images
    return _blend_(images, level.mean(dim=(-2, -1), keepdim=True), factors)


def adjust_saturation_(images: Tensor, factors: Tensor) -> Tensor:
    """Move images [b, 3, H, W] away from their luma by factors >= 0, [b, 1, 1, 1]; clamped to [0, 1]."""
    return _blend_(images, luma(images), factors)


def _blend_(images: Tensor, base: Tensor, factors: Tensor) -> Tensor:
    return images.mul_(factors).add_(base * (1 - factors)).clamp_(0, 1)


def gaussian_blur(image: Tensor, sigma: float, kernel_size: int = 9) -> Tensor:
    """Return an image blurred with a Gaussian kernel cut off at `kernel_size`, mirrored at the edges.

    Rows, then columns: a weighted sum of shifted views each, which beats a convolution for three channels.

    Args:
        image: float32 [C, H, W].
        sigma: Standard deviation in pixels, > 0.
        kernel_size: Odd, in pixels; less along a side too short to mirror half a kernel.
    """
    height, width = image.shape[-2:]
    return _blur_along(_blur_along(image, 2, width, sigma, kernel_size), 1, height, sigma, kernel_size)


def _blur_along(image: Tensor, dim: int, side: int, sigma: float, kernel_size: int) -> Tensor:
    """Return the image blurred along one dimension of length `side`."""
    radius = min(kernel_size // 2, side - 1)
    kernel = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-radius, radius + 1)]
    total = sum(kernel)
    padding = (radius, radius, 0, 0) if dim == 2 else (0, 0, radius, radius)
    padded = F.pad(image, padding, mode="reflect")
    blurred = padded.narrow(dim, 0, side) * (kernel[0] / total)
    for tap in range(1, len(kernel)):
        blurred.add_(padded.narrow(dim, tap, side), alpha=kernel[tap] / total)
    return blurred


def gaussian_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Return Gaussian kernels [b, 2 * radius + 1] that sum to 1, of standard deviations [b] in pixels.

    At 0 the kernel is a single 1; taps too light to change a thousandth of a level of 255 are 0.
    """
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp_min(_LEAST_SIGMA)[:, None]).square())
    weights = torch.where(weights < _LEAST_WEIGHT, 0.0, weights)
    return weights / weights.sum(dim=1, keepdim=True)


def blur_each_along(images: Tensor, kernels: Tensor, dim: int) -> Tensor:
    """Return images [b, C, H, W] blurred along one dimension, each by its kernel of [b, K], mirrored at the edges.

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
