"""Pixel operations of one crop, by OpenCV: float32 [H, W, 3] from 0 to 255, several times as fast as tensors are.

Each gives what Pillow gives up to rounding to 8 bits, and what `color` gives for whole batches up to rounding in
float32; the tests compare both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.color import GRAY_WEIGHTS

Pixels = npt.NDArray[np.float32]
"""float32 [H, W, 3], contiguous, 0 to 255."""
Affine = npt.NDArray[np.float64]
"""[4, 4]: a linear change of colours and an offset, on (red, green, blue, 1)."""

FULL = 255.0
_HUE_DEGREES = 360.0
_LEAST_WEIGHT = 1e-6  # of a tap of the blur, the middle one being 1


def use_one_thread() -> None:
    """Keep OpenCV from starting threads: loader processes have one core each, and a fork does not survive threads."""
    cv2.setNumThreads(0)


def cut_and_resize(source: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return a cut-out of an image, bicubically resized with antialiasing: uint8 [h, w, 3].

    Args:
        source: uint8 [3, H, W].
        box: top, left, height, width in pixels.
        size: (h, w) of the result.
    """
    top, left, height, width = box
    cut = source[None, :, top : top + height, left : left + width]
    # Rows of whole pixels: PyTorch resizes those by vector instructions, and leaves the result so.
    cut = cut.contiguous(memory_format=torch.channels_last)
    if (height, width) != size:
        cut = F.interpolate(cut, size, mode="bicubic", antialias=True)
    return np.ascontiguousarray(cut[0].permute(1, 2, 0).numpy())  # [3, h, w] -> [h, w, 3]


def flip(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return pixels uint8 [h, w, 3] with left and right exchanged."""
    return np.asarray(cv2.flip(pixels, 1), dtype=np.uint8)


def _pixels(values: npt.ArrayLike) -> Pixels:
    """Return values as float32, uncopied where they are: OpenCV does not say what it returns."""
    return np.asarray(values, dtype=np.float32)


def _affine(*rows: tuple[float, float, float, float]) -> Affine:
    return np.array((*rows, (0.0, 0.0, 0.0, 1.0)))


def brightness(factor: float) -> Affine:
    """Return the change that multiplies all channels."""
    return _affine((factor, 0.0, 0.0, 0.0), (0.0, factor, 0.0, 0.0), (0.0, 0.0, factor, 0.0))


def contrast(factor: float, mean_luma: float) -> Affine:
    """Return the change that moves colours away from the image's mean luma, 0 to 255."""
    offset = (1 - factor) * mean_luma
    return _affine((factor, 0.0, 0.0, offset), (0.0, factor, 0.0, offset), (0.0, 0.0, factor, offset))


def saturation(factor: float) -> Affine:
    """Return the change that moves colours away from their own luma; 0: grey."""
    red, green, blue = ((1 - factor) * weight for weight in GRAY_WEIGHTS)
    return _affine((red + factor, green, blue, 0.0), (red, green + factor, blue, 0.0), (red, green, blue + factor, 0.0))


def mean_luma(pixels: Pixels, pending: Affine | None) -> float:
    """Return the mean luma that pixels have after a change that is still to be made."""
    means: Sequence[float] = cv2.mean(pixels)[:3]
    if pending is not None:
        means = (pending @ (*means, 1.0))[:3].tolist()
    return sum(weight * mean for weight, mean in zip(GRAY_WEIGHTS, means, strict=True))


def change_colors(pixels: Pixels, change: Affine | None) -> Pixels:
    """Return pixels after an affine change, not clamped."""
    return pixels if change is None else _pixels(cv2.transform(pixels, change[:3].astype(np.float32)))


def clamp_(pixels: Pixels) -> Pixels:
    """Bring values into 0 to 255, in place."""
    plane = pixels.reshape(pixels.shape[0], -1)
    cv2.threshold(plane, FULL, 0, cv2.THRESH_TRUNC, dst=plane)
    cv2.threshold(plane, 0, 0, cv2.THRESH_TOZERO, dst=plane)
    return pixels


def turn_hue(pixels: Pixels, shift: float) -> Pixels:
    """Return pixels with their hue turned by a shift in turns."""
    hsv = _pixels(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))  # degrees, 0 to 1, 0 to 255
    # OpenCV takes hues beyond a turn, but none below 0.
    cv2.add(hsv, np.array(((shift % 1.0) * _HUE_DEGREES, 0.0, 0.0, 0.0)), dst=hsv)
    return _pixels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def blur(pixels: Pixels, sigma: float, kernel_px: int) -> Pixels:
    """Return pixels blurred with a Gaussian kernel of at most `kernel_px` taps, mirrored at the edges.

    Taps too light to change a thousandth of a level are left out.
    """
    height, width = pixels.shape[:2]
    across = _kernel(sigma, min(kernel_px // 2, width - 1))
    down = across if width == height else _kernel(sigma, min(kernel_px // 2, height - 1))
    return _pixels(cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REFLECT_101))


def _kernel(sigma: float, radius: int) -> Pixels:
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-radius, radius + 1)]
    kept = [weight for weight in weights if weight >= _LEAST_WEIGHT]
    total = sum(kept)
    return _pixels([weight / total for weight in kept])


def solarize_(pixels: Pixels, threshold: float) -> Pixels:
    """Invert the values from a threshold on, in place."""
    np.subtract(FULL, pixels, out=pixels, where=pixels >= threshold)
    return pixels


def write_planes(pixels: Pixels, crop: Tensor) -> None:
    """Write pixels into a crop, float32 [3, H, W], contiguous, as 0 to 1."""
    cv2.mixChannels([pixels], list(crop.numpy()), [0, 0, 1, 1, 2, 2])
    crop.div_(FULL)  # now, while it is in the cache
