"""Common JPEGs decoded by simplejpeg where it is installed: the pixels of Pillow in half the time."""

from __future__ import annotations

import functools
import importlib
import struct
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

JPEG_START = b"\xff\xd8\xff"

_SCALES = (8, 4, 2)  # what Pillow chooses among
_HEADER_BYTES = 2**16
_ORIENTATION = 0x0112  # EXIF tag
_COLOR_SPACES = ("YCbCr", "Gray")


def decode_common_jpeg(content: bytes, min_short_side: int | None, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """Return the image in a JPEG as uint8 [H, W, 3], or None where it must be decoded with more care.

    That is: simplejpeg is not installed; the image is turned by its EXIF tag, has four channels or other colours, is
    larger than `max_pixels` or twice as large as needed after the coarsest decoding; or anything about it is damaged.

    Args:
        content: The file.
        min_short_side: Decode at 1/2, 1/4 or 1/8 of the size as long as the shorter side keeps this many pixels.
        max_pixels: Pixels of the decoded image at most.
    """
    library = _simplejpeg()
    if library is None or not content.startswith(JPEG_START):
        return None
    try:
        height, width, color_space, _ = library.decode_jpeg_header(content)
        least = min_short_side or min(height, width)
        scale = next((scale for scale in _SCALES if min(height, width) // least >= scale), 1)
        size = (-(-height // scale), -(-width // scale))
        is_common = color_space in _COLOR_SPACES and size[0] * size[1] <= max_pixels and min(size) < 2 * least
        if not is_common or _is_turned(content):
            return None
        # It takes the least size that is no smaller than this: that of the scale.
        shrink = {} if scale == 1 else {"min_height": size[0], "min_width": size[1]}
        pixels: npt.NDArray[np.uint8] = library.decode_jpeg(content, colorspace="RGB", **shrink)
    except (ValueError, RuntimeError, MemoryError, SyntaxError, LookupError, struct.error, OSError):
        return None
    return pixels if pixels.shape[:2] == size else None


def _is_turned(content: bytes) -> bool:
    """Return whether an orientation other than upright may be noted in the header."""
    header = content[:_HEADER_BYTES]
    if b"tiff:Orientation" in header:
        return True
    start = header.find(b"Exif\0\0")
    if start < 0:
        return False
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on damaged tags: Pillow reads what is left of them, here as there
        exif.load(content[start : start + _HEADER_BYTES])
        return bool(exif.get(_ORIENTATION, 1) != 1)


@functools.cache
def _simplejpeg() -> Any:
    """Return the library, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None
