"""Index masks as files and over photographs, and clips of them as MP4 or animated GIF."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_equi.evaluation.mask_metrics import VOID, mask_boundary

MAX_PANEL_WIDTH = 320
"""Width of one picture in an animation, pixels: larger ones only make the file larger."""
MAX_GIF_FRAMES = 60
"""A GIF of more is large, and Pillow holds all its pictures in memory."""

_FRAMES_PER_SECOND = 12.0

_OPACITY = 0.5
_BITS = 8
_VOID_COLOUR = (224, 224, 192)

Picture = NDArray[np.uint8]


@functools.cache
def mask_palette() -> tuple[int, ...]:
    """Return 256 colours as 768 numbers 0..255: those of PASCAL VOC and DAVIS, black for 0, dark red for 1.

    Bit k of red, green and blue, from the highest down, are bits 3k, 3k + 1 and 3k + 2 of the index.
    """
    colours = np.zeros((256, 3), dtype=np.int64)
    for index, channel, bit in itertools.product(range(256), range(3), range(_BITS)):
        source = 3 * bit + channel
        colours[index, channel] |= (index >> source & 1) << (_BITS - 1 - bit)
    colours[VOID] = _VOID_COLOUR
    return tuple(int(value) for value in colours.ravel())


def write_index_mask(path: Path, mask: Picture) -> None:
    """Write an index mask [H, W] uint8 as PNG with a palette, as DAVIS stores its own."""
    image = Image.fromarray(mask)
    image.putpalette(list(mask_palette()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def overlay(photograph: Picture, mask: Picture) -> Picture:
    """Return a photograph [H, W, 3] with an index mask [H, W] over it: tinted, with a white line around each object.

    A mask of another size is resampled to that of the photograph.
    """
    height, width = photograph.shape[:2]
    if mask.shape != (height, width):
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    colours = np.array(mask_palette(), dtype=np.float64).reshape(256, 3)[mask]  # [H, W, 3]
    is_object = (mask > 0) & (mask != VOID)
    weight = np.where(is_object, _OPACITY, 0.0)
    line = np.zeros_like(is_object)
    for number in np.unique(mask[is_object]):
        line |= mask_boundary(mask == number)
    weight[line & is_object] = 1.0
    colours[line & is_object] = 255.0
    mixed = photograph * (1 - weight[..., None]) + colours * weight[..., None]
    mixed_pixels: Picture = np.rint(mixed).clip(0, 255).astype(np.uint8)
    return mixed_pixels


def shrink(picture: Picture, max_width: int = MAX_PANEL_WIDTH) -> Picture:
    """Return a picture [H, W, 3] no wider than `max_width`."""
    height, width = picture.shape[:2]
    if width <= max_width:
        return picture
    size = (max_width, max(1, round(height * max_width / width)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _reduced(picture: Picture) -> Image.Image:
    """Return a picture in 256 colours of its own; Pillow's own choice takes a hundred times as long."""
    image = Image.fromarray(picture)
    return image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def has_mp4() -> bool:
    """Return whether clips can be written as MP4: whether imageio-ffmpeg, which brings an encoder, is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def max_animation_frames() -> int | None:
    """Return how many pictures of a clip `write_animation` is to be given at most; None: any number."""
    return None if has_mp4() else MAX_GIF_FRAMES


def write_animation(path: Path, pictures: Iterable[Picture]) -> Path:
    """Write pictures as `path.mp4`, or as `path.gif` where there is no encoder, and return the file.

    Raises:
        ValueError: for no picture.
    """
    if has_mp4():
        return write_mp4(path.with_name(f"{path.name}.mp4"), pictures)
    return write_gif(path.with_name(f"{path.name}.gif"), pictures)


def write_mp4(path: Path, pictures: Iterable[Picture], *, frames_per_second: float = _FRAMES_PER_SECOND) -> Path:
    """Write pictures [H, W, 3] of one size as a film (H.264), under a temporary name first, and return the file.

    The pictures are taken one by one. A side of an odd number of pixels, which the format does not know, is filled up
    by one.

    Raises:
        ValueError: for no picture.
        ImportError: without imageio-ffmpeg.
    """
    import imageio_ffmpeg

    frames = (np.pad(p, ((0, p.shape[0] % 2), (0, p.shape[1] % 2), (0, 0)), mode="edge") for p in pictures)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"expected at least one picture for {path}, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")  # the encoder goes by the ending
    writer = imageio_ffmpeg.write_frames(
        str(pending),
        (first.shape[1], first.shape[0]),
        fps=frames_per_second,
        macro_block_size=2,
        ffmpeg_log_level="error",
    )
    try:
        with contextlib.closing(writer):
            writer.send(None)
            for frame in itertools.chain([first], frames):
                writer.send(np.ascontiguousarray(frame))
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)
    return path


def write_gif(path: Path, pictures: Iterable[Picture], *, frames_per_second: float = _FRAMES_PER_SECOND) -> Path:
    """Write pictures [H, W, 3] of one size as an endless animation, under a temporary name first.

    Returns the file.

    Raises:
        ValueError: for no picture.
    """
    images = (_reduced(picture) for picture in pictures)
    first = next(images, None)
    if first is None:
        raise ValueError(f"expected at least one picture for {path}, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        first.save(
            pending,
            format="GIF",
            save_all=True,
            append_images=images,
            duration=round(1000 / frames_per_second),
            loop=0,
        )
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)
    return path
