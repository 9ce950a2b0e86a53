"""The two costly colour operations of the augmentation, two to four times as fast as torchvision's on small crops.

Both give torchvision's values up to rounding; the tests compare them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the luma, as torchvision rounds those of ITU-R BT.601."""


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


def gaussian_blur(image: Tensor, sigma: float, kernel_size: int = 9) -> Tensor:
    """Return an image blurred with a Gaussian kernel cut off at `kernel_size`, mirrored at the edges.

    Rows, then columns: a weighted sum of shifted views each, which beats a convolution for three channels.

    Args:
        image: float32 [3, H, W].
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
