"""Images of any number of channels, 8 or 16 bits or floating point, in full precision: TIFF, npy, PNG and others."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.decode import DECODE_ERRORS, MAX_PIXELS
from dinov2_equi.data.datasets.encoded import EncodedImages
from dinov2_equi.data.datasets.view import View

ARRAY_SUFFIXES = (".npy",)
"""Suffixes of images beside those that are read as RGB."""

_NPY_START = b"\x93NUMPY"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: of more than 4 GiB
_PNG_START, _PNG_DEPTH = b"\x89PNG", 24  # where the header says how many bits a value has
_START_BYTES = 32
_SLACK = 1e-3  # beyond 0 to 1: rounding of whoever has scaled the values
RGB_CHANNELS = 3

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class ChannelFormat:
    """How images become float32 [C, H, W] in [0, 1]."""

    num_channels: int
    """C. A file holds [H, W, C], [C, H, W], or [H, W] where C is 1."""
    value_range: tuple[float, float] | None = None
    """Values that become 0 and 1; what lies outside is cut off. None: the range of the type for 8 and 16 bits without
    sign, and floating-point values must be in [0, 1]."""

    def __str__(self) -> str:
        """Return it in words."""
        words = f"images of {self.num_channels} channels"
        if self.value_range is None:
            return words
        low, high = self.value_range
        return f"{words} with values from {low:g} to {high:g}"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            DatasetError: There is no channel, or no value between those that become 0 and 1.
        """
        if self.num_channels < 1:
            raise DatasetError(f"in_channels must be at least 1; got {self.num_channels}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise DatasetError(f"value_range must go from a lower value to a higher one; got {self.value_range}")


def channel_format(in_channels: int, value_range: Sequence[float] | None) -> ChannelFormat | None:
    """Return how images are read with these settings; None: as photographs, made RGB.

    Args:
        in_channels: `data.in_channels`.
        value_range: `data.value_range`; None or empty: not given.

    Raises:
        DatasetError: See `ChannelFormat`.
    """
    if in_channels == RGB_CHANNELS and not value_range:
        return None
    return ChannelFormat(in_channels, (value_range[0], value_range[1]) if value_range else None)


class ChannelImages(View[EncodedImages]):
    """A view of a data set whose images are not made RGB: every channel as it is in the file, scaled to [0, 1].

    Args:
        dataset: Images that lie encoded.
        channels: How they are read.
    """

    def __init__(self, dataset: EncodedImages, channels: ChannelFormat) -> None:
        super().__init__(dataset)
        self.channels = channels

    def load(self, index: int) -> Image.Image:
        """Return image `index` for people to look at: the first three channels, or the first in grey.

        Raises:
            UnreadableImageError: See `load_tensor`.
        """
        shown = channels_as_rgb(self.load_tensor(index)).mul(255).round().to(torch.uint8)
        return Image.fromarray(shown.permute(1, 2, 0).numpy())

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as float32 [C, H, W] in [0, 1].

        Args:
            index: Which image.
            min_short_side: The image may be shrunk by a whole number as long as its shorter side keeps this many
                pixels. None: full resolution.

        Raises:
            UnreadableImageError: The file cannot be decoded, or holds another number of channels or values out of
                range; names the file, and what was found.
        """
        return decode_channels(self.dataset.encoded(index), self.dataset.path(index), self.channels, min_short_side)


def as_channels(dataset: ImageDataset, channels: ChannelFormat, spec: str) -> ChannelImages:
    """Return a data set read channel by channel.

    Raises:
        DatasetError: It holds no files, but images that are made or unpacked as RGB; names it.
    """
    if not isinstance(dataset, EncodedImages):
        raise DatasetError(
            f"{spec} holds photographs of red, green and blue alone: for data.in_channels={channels.num_channels} give "
            "files, as a folder, a list, a table, a pattern, tar shards, an LMDB file or a saved Hugging Face data set"
        )
    return ChannelImages(dataset, channels)


def channels_as_rgb(images: Tensor) -> Tensor:
    """Return images [..., C, H, W] as [..., 3, H, W] for people to look at: the first three channels, or the first."""
    if images.shape[-3] >= RGB_CHANNELS:
        return images[..., :RGB_CHANNELS, :, :]
    return images[..., :1, :, :].expand(*images.shape[:-3], RGB_CHANNELS, -1, -1)


def decode_channels(
    encoded: Path | bytes, path: str, channels: ChannelFormat, min_short_side: int | None = None
) -> Tensor:
    """Return the image in a file, or in its bytes, as `ChannelImages.load_tensor` does; `path` stands in messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged tags: here a file is good or bad
            values = _planes(_read_values(encoded), channels.num_channels)
            image = _scaled(values, channels.value_range)
    except DECODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(f"cannot read the image {path}: {reason}", path=path, reason=reason) from error
    factor = 1 if min_short_side is None else max(min(image.shape[1:]) // min_short_side, 1)
    return image if factor == 1 else F.avg_pool2d(image, factor)


def _read_values(encoded: Path | bytes) -> Values:
    """Return what a file holds, any shape and type."""
    if isinstance(encoded, bytes):
        start = encoded[:_START_BYTES]
    else:
        with encoded.open("rb") as file:
            start = file.read(_START_BYTES)
    if start.startswith(_NPY_START):
        if isinstance(encoded, bytes):
            return np.asarray(np.load(io.BytesIO(encoded), allow_pickle=False))
        return np.asarray(np.load(encoded, mmap_mode="r", allow_pickle=False))
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    tifffile = _tifffile() if start.startswith(_TIFF_STARTS) else None
    if tifffile is not None:
        try:
            return np.asarray(tifffile.imread(source))
        except tifffile.TiffFileError as error:
            raise ValueError(str(error)) from error
    with Image.open(source) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} at most")
        if start.startswith(_PNG_START) and start[_PNG_DEPTH] == 16 and image.mode in ("RGB", "RGBA", "LA"):
            return _read_png(encoded, is_grey=image.mode == "LA")  # Pillow makes 8 bits of 16
        num_frames = int(getattr(image, "n_frames", 1))
        if image.format == "TIFF" and num_frames > 1:
            return np.stack([_pillow_values(image, frame) for frame in range(num_frames)])
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.convert("RGB") if upright.mode == "P" else upright)


def _pillow_values(image: Image.Image, frame: int) -> Values:
    image.seek(frame)
    return np.asarray(image)


def _read_png(encoded: Path | bytes, *, is_grey: bool) -> Values:
    content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("the PNG is damaged")
    if values.ndim == 3:  # blue, green, red, and perhaps alpha
        # OpenCV makes three equal channels of a grey one with alpha.
        values = values[:, :, [0, 3] if is_grey else [2, 1, 0, 3][: values.shape[2]]]
    return np.asarray(values)


def _tifffile() -> Any:
    """Return the package, or None where it is not installed and Pillow has to do."""
    try:
        return importlib.import_module("tifffile")
    except ImportError:
        return None


def _planes(values: Values, num_channels: int) -> Values:
    """Return values as [C, H, W].

    Raises:
        ValueError: They have another shape; names it.
    """
    shape = values.shape
    values = values.reshape([side for side in shape if side != 1]) if values.ndim > 3 else values
    if values.ndim == 2 and num_channels == 1:
        values = values[None]
    if values.ndim == 3 and values.shape[0] != num_channels and values.shape[2] == num_channels:
        values = values.transpose(2, 0, 1)  # [H, W, C] -> [C, H, W]
    if values.ndim != 3 or values.shape[0] != num_channels:
        raise ValueError(
            f"its shape is {list(shape)}; data.in_channels={num_channels} expects [H, W, {num_channels}] or "
            f"[{num_channels}, H, W]"
        )
    if values.size > RGB_CHANNELS * MAX_PIXELS:
        raise ValueError(f"{values.size} values are more than the {RGB_CHANNELS * MAX_PIXELS:,} at most")
    return values


def _scaled(values: Values, value_range: tuple[float, float] | None) -> Tensor:
    """Return values as float32 in [0, 1].

    Raises:
        ValueError: Their type or range is not one that is scaled by itself; says what to set.
    """
    if not (values.dtype.kind in "uif" or values.dtype == np.bool_):
        raise ValueError(f"its values are of type {values.dtype}; expected whole numbers or floating point")
    image = np.ascontiguousarray(values, dtype=np.float32)  # exact for 16 bits
    if value_range is not None:
        low, high = value_range
        image = np.nan_to_num((image - np.float32(low)) / np.float32(high - low), nan=0.0).clip(0, 1)
    elif values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # in either order of the bytes
        image /= np.float32(np.iinfo(values.dtype).max)
    else:
        image = np.nan_to_num(image, nan=0.0, posinf=np.inf)
        low, high = float(image.min(initial=0)), float(image.max(initial=0))
        if low < -_SLACK or high > 1 + _SLACK:
            raise ValueError(
                f"its values, of type {values.dtype}, lie between {low:g} and {high:g}: set data.value_range to those "
                "that should become 0 and 1"
            )
        image = image.clip(0, 1)
    return torch.from_numpy(image)
