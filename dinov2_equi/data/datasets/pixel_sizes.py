"""Width and height of many image files, from their headers: nothing is decoded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_equi.data.datasets.base import spread_indices
from dinov2_equi.data.datasets.decode import DECODE_ERRORS
from dinov2_equi.data.datasets.listed import ListedImages
from dinov2_equi.data.datasets.stored_index import STORED_FROM, index_places, load_index, store_index
from dinov2_equi.logging.progress import tracked

Sizes = npt.NDArray[np.uint32]

_ARRAYS = ("sizes",)
_TIFF_SIZE = (256, 257)  # tags
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF tag; from this value on, width and height change places


def pixel_sizes(dataset: ListedImages, max_images: int | None = None) -> tuple[list[int], Sizes]:
    """Return which images were looked at, and (width, height) of each upright, uint32 [n, 2], memory-mapped if stored.

    Where no header can be read, both are 0. A progress bar is shown. Once all headers of a folder of `STORED_FROM`
    images or more were read, they are stored in the user's cache as its index is, and nothing is read the next time.
    Those of a list or a pattern are not: nothing would tell that its files are others.

    Args:
        dataset: Images by their paths.
        max_images: Evenly spread; None: all.
    """
    indices = spread_indices(len(dataset), len(dataset) if max_images is None else max_images)
    if dataset.num_bytes is None:
        return indices, _read(dataset, indices)
    places = index_places(["pixel sizes", str(Path(dataset.path(0)).resolve()), _digest(dataset)])
    stored = load_index(places, _ARRAYS, lambda arrays: arrays["sizes"].shape == (len(dataset), 2))
    if stored is not None:
        return list(range(len(dataset))), stored["sizes"]
    sizes = _read(dataset, indices)
    if len(indices) == len(dataset) >= STORED_FROM:
        sizes = store_index(places, {"sizes": sizes})["sizes"]
    return indices, sizes


def header_size(file: Path) -> tuple[int, int]:
    """Return (width, height) of the image in a file as it is shown upright; (0, 0) where its header cannot be read."""
    try:
        with Image.open(file) as image:
            tags = getattr(image, "tag_v2", {})
            # Of a TIFF, newer versions of Pillow give the size that it has when it is turned.
            width, height = (int(tags[tag]) for tag in _TIFF_SIZE) if image.format == "TIFF" else image.size
            # Without this question a PNG would be decoded: such a part may follow its pixels.
            has_tags = "exif" in image.info or image.format == "TIFF"
            is_turned = has_tags and int(image.getexif().get(_ORIENTATION, 1)) >= _FIRST_TURNED
    except DECODE_ERRORS:
        return 0, 0
    return (height, width) if is_turned else (width, height)


def _read(dataset: ListedImages, indices: Sequence[int]) -> Sizes:
    sizes = np.zeros((len(indices), 2), np.uint32)
    shown = tracked(indices, f"Reading {len(indices):,} headers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on damaged tags and large sizes
        for row, index in enumerate(shown):
            sizes[row] = header_size(dataset.encoded(index))
    return sizes


def _digest(dataset: ListedImages) -> str:
    """Return a SHA-256 of all paths and of the bytes of the files."""
    digest = hashlib.sha256()
    for values in (dataset.paths.text, dataset.paths.ends, dataset.num_bytes):
        assert values is not None
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
