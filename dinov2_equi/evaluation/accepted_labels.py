"""Several right answers an image: the reassessed labels of ImageNet's validation images (ReaL), and scoring by them."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset

REAL_ADDRESS = "https://github.com/google-research/reassessed-imagenet"
_VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")


def is_right(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return which predictions are right, bool of the shape of `predicted`.

    Args:
        predicted: [..., n] class numbers.
        labels: [n] class numbers, or [n, C] bool, the classes that are accepted for each image.
    """
    if labels.ndim == 1:
        return predicted == labels
    return labels[torch.arange(len(labels), device=labels.device), predicted]


def read_real_labels(path: Path, images: ImageDataset, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the images that have accepted classes, and these classes.

    The file is `real.json`: for each validation image, in the order of the numbers in the file names
    (`ILSVRC2012_val_00000001` first), a list of class numbers from 0; an empty list means that no class was agreed on.

    Args:
        path: the file.
        images: validation images under their original file names, in any folders; all or a part of them.
        num_classes: C, of the training images.

    Returns:
        rows: [n] int64, the images with at least one accepted class; the others are left out, as is the custom.
        accepted: [n, C] bool.

    Raises:
        OSError: if there is no such file; says where to get it.
        DatasetError: if it holds something else, or an image has no entry in it; names the first.

    Source: Beyer et al. 2020 (arXiv 2006.07159).
    """
    entries = _read_entries(path, num_classes)
    rows, accepted = [], []
    for row in range(len(images)):
        number = _validation_number(images.name(row))
        if number >= len(entries):
            raise DatasetError(f"{path} has labels of {len(entries)} images; {images.name(row)} is none of them")
        if entries[number]:
            rows.append(row)
            accepted.append(torch.zeros(num_classes, dtype=torch.bool).index_fill(0, torch.tensor(entries[number]), 1))
    if not rows:
        raise DatasetError(f"{path} has no label for any of the {len(images)} validation images; check both")
    return torch.tensor(rows), torch.stack(accepted)


def _read_entries(path: Path, num_classes: int) -> list[list[int]]:
    if not path.is_file():
        raise OSError(f"there is no file {path}; real.json is at {REAL_ADDRESS}")
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); expected real.json of {REAL_ADDRESS}") from error
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"expected a list with a list of class numbers for each image in {path}; see {REAL_ADDRESS}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or not all(type(c) is int and 0 <= c < num_classes for c in entry):
            raise DatasetError(
                f"entry {number} of {path} must be a list of class numbers 0 to {num_classes - 1}, the classes of the "
                f"training images; got {str(entry)[:80]}"
            )
    return entries


def _validation_number(name: str) -> int:
    """Return which validation image a file is, counted from 0."""
    match = _VALIDATION_FILE.match(PurePosixPath(name).name)
    if match is None or int(match[1]) < 1:
        raise DatasetError(
            f"ReaL's labels go by the number in the file name: expected ILSVRC2012_val_00000001.JPEG and so on, "
            f"got {name}"
        )
    return int(match[1]) - 1
