"""Clips of video as folders of frames, with index masks of the first frame or of more: DAVIS, VIP, any folder."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Formats that keep an index mask as it is."""

_BINARY_OBJECT = 255
_NUMBER = re.compile(r"(\d+)")
_RESOLUTIONS = ("480p", "Full-Resolution", "")
_VIP_LISTS = ("lists/val_videos.txt", "lists/val.txt", "val_videos.txt")

_DAVIS_HELP = (
    "DAVIS 2017 lies as ROOT/JPEGImages/480p/CLIP/00000.jpg, ROOT/Annotations/480p/CLIP/00000.png and "
    "ROOT/ImageSets/2017/val.txt; get DAVIS-2017-trainval-480p.zip from davischallenge.org"
)
_VIP_HELP = (
    "VIP lies as ROOT/Images/CLIP/*.jpg, ROOT/Annotations/Category_ids/CLIP/*.png and ROOT/lists/val_videos.txt, where "
    "ROOT may be the folder above VIP_Fine; get VIP (Video Instance-level Parsing) from sysu-hcp.net/lip"
)
_FOLDER_HELP = (
    "give a folder of frames, or of one sub-folder of frames a clip, and with --masks a folder of the same shape whose "
    "masks are named as the frames; for one clip the mask of its first frame will do"
)


@dataclass(frozen=True)
class VideoClip:
    """Frames in order, and what is known of their masks.

    Attributes:
        name: of the clip.
        frames: image files.
        masks: index mask of each frame; None where there is none. The first frame always has one.
        is_binary: whether the masks are black and white pictures of one object, 0 and 255, and no index masks.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    is_binary: bool = False

    def load_mask(self, index: int) -> NDArray[np.uint8] | None:
        """Return the index mask [H, W] of a frame, 0 background and 255 void; None where there is none.

        Raises:
            UnreadableImageError: the file is no index mask; names it.
        """
        path = self.masks[index]
        if path is None:
            return None
        mask = read_index_mask(path)
        return np.where(mask == _BINARY_OBJECT, np.uint8(1), mask) if self.is_binary else mask


def read_index_mask(path: Path) -> NDArray[np.uint8]:
    """Return the indices [H, W] uint8 in a mask: of its palette, or grey values; of colours only if they are grey.

    Raises:
        UnreadableImageError: the file cannot be decoded, has colours, or an index above 255; names it.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise UnreadableImageError(f"cannot read the mask {path}: {error}. Replace it by a readable copy.") from error
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise UnreadableImageError(
                f"expected an index mask, one number a pixel, in {path}, got colours; save it with a palette, or as "
                "grey values"
            )
        values = values[..., 0]
    if values.size and (values.min() < 0 or values.max() > np.iinfo(np.uint8).max):
        raise UnreadableImageError(
            f"expected indices 0 to 255 in the mask {path}, got {values.min()} to {values.max()}"
        )
    return values.astype(np.uint8)


def davis_clips(root: Path) -> list[VideoClip]:
    """Return the validation clips of DAVIS 2017; without its list of them, all clips.

    Also takes folders without the level of the resolution, as YouTube-VOS.

    Raises:
        DatasetError: frames or masks are missing: says where they were sought, how they must lie, where to get them.
    """
    for resolution in _RESOLUTIONS:
        frames, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
        if frames.is_dir() and masks.is_dir():
            return _listed_clips(frames, masks, [root / "ImageSets" / "2017" / "val.txt"], _DAVIS_HELP)
    raise DatasetError(f"no JPEGImages and Annotations in {root}: {_DAVIS_HELP}")


def vip_clips(root: Path) -> list[VideoClip]:
    """Return the validation clips of VIP with their masks of part categories; without its list of them, all clips.

    Raises:
        DatasetError: frames or masks are missing: says where they were sought, how they must lie, where to get them.
    """
    for folder in (root, root / "VIP_Fine", root / "VIP"):
        frames, masks = folder / "Images", folder / "Annotations" / "Category_ids"
        if frames.is_dir() and masks.is_dir():
            return _listed_clips(frames, masks, [folder / name for name in _VIP_LISTS], _VIP_HELP)
    raise DatasetError(f"no Images and Annotations/Category_ids in {root} or {root}/VIP_Fine: {_VIP_HELP}")


def folder_clips(frames: Path, masks: Path) -> list[VideoClip]:
    """Return the clip in a folder of frames, or the clips in its sub-folders.

    Args:
        frames: images, or sub-folders of images.
        masks: the same shape with masks under the names of the frames; for one clip also one mask file, of its first
            frame.

    Raises:
        DatasetError: frames or the mask of a first frame are missing; says what is expected.
    """
    if not frames.is_dir():
        raise DatasetError(f"no such folder of frames: {frames}; {_FOLDER_HELP}")
    if _files(frames, IMAGE_SUFFIXES):
        return [_clip(frames.resolve().name, frames, masks)]
    names = _subfolders(frames)
    if not names:
        raise DatasetError(f"no frames in {frames}; {_FOLDER_HELP}")
    return [_clip(name, frames / name, masks / name) for name in names]


def choose_clips(clips: Sequence[VideoClip], names: Sequence[str]) -> list[VideoClip]:
    """Return the clips with these names, in the order of `clips`.

    Raises:
        DatasetError: a name that is none; gives the nearest.
    """
    known = [clip.name for clip in clips]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise DatasetError(f"there is no clip {name!r} among {len(known)}; the nearest are {', '.join(near)}")
    return [clip for clip in clips if clip.name in names]


def _listed_clips(frames: Path, masks: Path, lists: Sequence[Path], help_text: str) -> list[VideoClip]:
    found = next((path for path in lists if path.is_file()), None)
    if found is not None:
        names = found.read_text(encoding="utf-8").split()
    else:
        names = [name for name in _subfolders(frames) if (masks / name).is_dir()]
        logger.warning("there is no list of the validation clips, %s: all %d are taken", lists[0], len(names))
    if not names:
        raise DatasetError(f"no clip with frames in {frames} and masks in {masks}: {help_text}")
    return [_clip(name, frames / name, masks / name) for name in names]


def _clip(name: str, frames: Path, masks: Path) -> VideoClip:
    """Return one clip; masks are matched to frames by name without its ending."""
    paths = _files(frames, IMAGE_SUFFIXES) if frames.is_dir() else []
    if not paths:
        raise DatasetError(f"clip {name}: no frames in {frames}; expected images such as {frames / '00000.jpg'}")
    if masks.is_file():
        by_stem = {paths[0].stem: masks}
    else:
        by_stem = {path.stem: path for path in _files(masks, MASK_SUFFIXES)} if masks.is_dir() else {}
    if paths[0].stem not in by_stem:
        raise DatasetError(
            f"clip {name}: no mask of its first frame {paths[0].name}; expected {masks / (paths[0].stem + '.png')}"
        )
    clip = VideoClip(name, tuple(paths), tuple(by_stem.get(path.stem) for path in paths))
    return replace(clip, is_binary=_is_black_and_white(by_stem[paths[0].stem]))


def _is_black_and_white(path: Path) -> bool:
    """Return whether a mask is a picture of one object, 0 and 255, without a palette that gives 255 a meaning."""
    values = set(np.unique(read_index_mask(path)).tolist())
    with Image.open(path) as image:
        return image.mode != "P" and _BINARY_OBJECT in values and values <= {0, _BINARY_OBJECT}


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of these kinds in a folder, `frame2` before `frame10`."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(paths, key=lambda path: _natural(path.stem))


def _subfolders(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sorting key that compares numbers in a name as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in _NUMBER.split(name) if part]
