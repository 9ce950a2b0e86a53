"""Decoding of image files of any kind to upright 8-bit RGB."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinov2_equi.data.datasets.base import UnreadableImageError, image_to_tensor
from dinov2_equi.data.datasets.jpeg import JPEG_START, decode_common_jpeg

MAX_PIXELS = 100_000_000
"""Pixels of an image at most, 0.7 GB while it is decoded (2 GB at 16 bits); a JPEG counts as large as it is decoded."""

_MAX_JPEG_BYTES = 2**28
_WHITE = (255, 255, 255, 255)
# What Pillow and NumPy raise on damaged files: OSError (truncated, unknown format), SyntaxError (broken chunks), the
# next ones (broken headers and tags), DecompressionBombError (a header that claims a gigantic size).
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)


def read_rgb(path: Path, min_short_side: int | None = None) -> Image.Image:
    """Return the first frame of an image file as upright RGB.

    Args:
        path: The file; its content decides the format, not its name.
        min_short_side: The image may be shrunk by a whole number as long as its shorter side keeps this many pixels; a
            JPEG is decoded at 1/2, 1/4 or 1/8 of its size, several times faster. None: full resolution.

    Raises:
        UnreadableImageError: The file is missing, truncated, not an image, or has more than `MAX_PIXELS`; names the
            file and the cause.
    """
    return decode_rgb(path, str(path), min_short_side)


def decode_rgb(file: Path | BinaryIO, name: str, min_short_side: int | None = None) -> Image.Image:
    """Return the image in a file, open or not, as `read_rgb` does; `name` stands in the error message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged tags and large sizes: here a file is good or bad
            return _decode(file, min_short_side)
    except DECODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(
            f"cannot read the image {name}: {reason}. Remove the file, or replace it by a readable copy.",
            path=name,
            reason=reason,
        ) from error


def decode_tensor(file: Path | bytes, name: str, min_short_side: int | None = None) -> Tensor:
    """Return the image in a file, or in its bytes, as `decode_rgb` does: uint8 [3, H, W].

    A common JPEG is decoded in half the time.

    Raises:
        UnreadableImageError: See `read_rgb`; `name` stands in the message.
    """
    content = file if isinstance(file, bytes) else _jpeg_content(file)
    pixels = None if content is None else decode_common_jpeg(content, min_short_side, MAX_PIXELS)
    if pixels is not None:
        return torch.from_numpy(pixels).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    return image_to_tensor(decode_rgb(io.BytesIO(file) if isinstance(file, bytes) else file, name, min_short_side))


def _jpeg_content(path: Path) -> bytes | None:
    """Return the bytes of a JPEG file; None for any other, a gigantic one, and what cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(len(JPEG_START))
            if start != JPEG_START:
                return None
            rest = file.read(_MAX_JPEG_BYTES)
    except OSError:
        return None  # the slow way names the cause
    return None if len(rest) == _MAX_JPEG_BYTES else start + rest


def _decode(file: Path | BinaryIO, min_short_side: int | None) -> Image.Image:
    with Image.open(file) as image:
        if min_short_side is not None:
            # Only JPEG takes the hint; the decoded size is never below the one asked for.
            image.draft(None, (min_short_side, min_short_side))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded at most")
        rgb = to_rgb(image)
    factor = 1 if min_short_side is None else max(min(rgb.size) // min_short_side, 1)
    return rgb if factor == 1 else rgb.reduce(factor)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as upright 8-bit RGB.

    * The EXIF orientation is applied.
    * Transparency (alpha channel, transparent palette entry or colour) is laid over white.
    * Grey of 16 bits is scaled linearly, 0..65535 to 0..255 (Pillow's own conversion clips at 255); integers of
      32 bits count as 16 bits and are clipped.
    * Floating-point grey: 0..1 where no value exceeds 1, else 0..255; clipped.
    * CMYK, palette, black and white and the rest go through Pillow's conversion.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba)
    return image.convert("RGB")


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or of floats as mode L."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        full_scale = 1.0 if values.max() <= 1.0 else 255.0
    else:
        full_scale = 65535.0
    scaled = np.rint(values * (255.0 / full_scale)).clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8))
