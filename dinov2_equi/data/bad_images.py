"""Images that cannot be used: what is known of one, the file that lists them, and when there are too many."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError

logger = logging.getLogger(__name__)

FILE_NAME = "bad_images.jsonl"
LEAST_SIDE_PX = 8
"""An image whose shorter side is below this shows nothing that could be learned."""
GREATEST_ASPECT = 20
"""An image longer than this many times its shorter side is a strip; beside it, a batch that is padded to the largest
image would take gigabytes."""
_LEAST_SEEN = 1000  # images: before that many were seen, a share of bad ones says little
_SHOWN = 5


@dataclass(frozen=True)
class BadImage:
    """An image that was replaced by another one."""

    index: int
    """Its number in the data set."""
    path: str
    """The file, or the name in the data set."""
    reason: str


class TooManyBadImagesError(DatasetError):
    """More images than allowed cannot be used."""


def check_shape(image: Tensor, path: str) -> Tensor:
    """Return an image [3, H, W] that is worth cropping.

    Raises:
        UnreadableImageError: It is too small or too long; names the file and the limits.
    """
    height, width = image.shape[-2:]
    short, long = min(height, width), max(height, width)
    if short < LEAST_SIDE_PX or long > GREATEST_ASPECT * short:
        reason = (
            f"{width} x {height} pixels; expected a shorter side of at least {LEAST_SIDE_PX}, and a longer one of at "
            f"most {GREATEST_ASPECT} times that"
        )
        raise UnreadableImageError(f"cannot use the image {path}: {reason}", path=path, reason=reason)
    return image


class BadImageLog:
    """Writes each bad image once to `bad_images.jsonl`, and counts.

    A line holds `index`, `path` and `reason`. A resumed run goes on with the file; its count starts anew.

    Args:
        folder: The run folder.
        max_fraction: Greatest share of bad images in what was read, 0 to 1. Before 1,000 images were read, the share is
            taken of 1,000.
        is_writer: False: count only. Of several processes that are told the same, one writes.
    """

    def __init__(self, folder: Path, max_fraction: float, *, is_writer: bool = True) -> None:
        self._path = folder / FILE_NAME
        self._is_writer = is_writer
        self._max_fraction = max_fraction
        self._num_seen = 0
        self._num_bad = 0
        self._known = _known_indices(self._path) if is_writer else set()

    def record(self, num_used: int, bad_images: Sequence[BadImage]) -> None:
        """Count the images of a batch, and the ones that were replaced to make it whole.

        Args:
            num_used: Images in the batch, of all processes.
            bad_images: What was read in vain for it.

        Raises:
            TooManyBadImagesError: The share of bad images is above `max_fraction`; names the last ones and the file.
        """
        self._num_seen += num_used + len(bad_images)
        if not bad_images:
            return
        self._num_bad += len(bad_images)
        if self._is_writer:
            self._write([image for image in bad_images if image.index not in self._known])
        if self._num_bad > self._max_fraction * max(self._num_seen, _LEAST_SEEN):
            shown = "; ".join(f"{image.path}: {image.reason}" for image in bad_images[:_SHOWN])
            raise TooManyBadImagesError(
                f"{self._num_bad} of the {self._num_seen} images read so far cannot be used, more than "
                f"data.max_bad_fraction={self._max_fraction:g} allows. {self._path} lists them; the last: {shown}. "
                "Repair or remove them, or allow more with data.max_bad_fraction"
            )

    def _write(self, images: Sequence[BadImage]) -> None:
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            for image in images:
                if image.index not in self._known:  # twice in one batch
                    self._known.add(image.index)
                    file.write(json.dumps(asdict(image)) + "\n")
                    logger.warning("image %s was replaced by another one: %s", image.path, image.reason)


def _known_indices(path: Path) -> set[int]:
    """Return the images that an earlier part of the run has listed; half a line, left by a kill, is cut off."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return {int(json.loads(line)["index"]) for line in whole.splitlines()}
