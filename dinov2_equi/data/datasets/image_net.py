"""ImageNet-1k in torchvision's folder layout, with DINOv2's index files where they are wanted."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2_equi.data.datasets.base import DatasetError, spread_indices
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.listed import ListedImages
from dinov2_equi.data.datasets.packed import PackedStrings

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = {"TRAIN": "train", "VAL": "val"}
_FILES = ("entries", "class-ids", "class-names")
_PATHS = {"TRAIN": "{id}/{id}_{number}.JPEG", "VAL": "{id}/ILSVRC2012_val_{number:08d}.JPEG"}
_LABELS = "labels.txt"
_LOOKED_FOR = 16  # images, evenly spread, that must exist where their paths come from index files


class ImageNet(ListedImages):
    """A split of ImageNet: `root/train/<class>/*.JPEG` or `root/val/<class>/*.JPEG`, sorted by class and name.

    With `extra`, the folder is searched once: `entries-<split>.npy`, `class-ids-<split>.npy` and
    `class-names-<split>.npy` are written there where they are missing, and read from then on. They have DINOv2's
    layout, so that either code reads the other's.

    Args:
        root: The folder that holds `train` and `val`; `labels.txt` with lines `n01440764,tench` names the classes.
        split: TRAIN or VAL.
        extra: The folder of the index files; None: none are read or written.

    Raises:
        DatasetError: Unknown split, a folder is missing or without images, or the index files are damaged or of other
            images; says what was looked for and where.
    """

    def __init__(self, root: Path | str, split: str = "TRAIN", extra: Path | str | None = None) -> None:
        if split not in _SPLIT_FOLDERS:
            raise DatasetError(f"ImageNet has the splits {', '.join(_SPLIT_FOLDERS)}; got split={split!r}")
        folder = Path(root).expanduser() / _SPLIT_FOLDERS[split]
        if not folder.is_dir():
            raise DatasetError(
                f"ImageNet, split {split}: looked for the folder {folder} and did not find it. Set root to the folder "
                "that holds train/<class>/ and val/<class>/, as in ImageNet:split=TRAIN:root=<folder>."
            )
        self.split = split
        files = [] if extra is None else [Path(extra).expanduser() / f"{name}-{split}.npy" for name in _FILES]
        targets: npt.NDArray[np.int32] | None
        if files and all(file.is_file() for file in files):
            paths, targets, classes = _read_extra(files, folder, split)
        else:
            found = ImageFolder(folder)
            paths, targets, classes = found.paths, found.class_numbers, found.classes
            if files:
                _write_extra(files, found, split)
        super().__init__(paths, folder, targets=targets, classes=classes, what=str(folder))


def _read_extra(
    files: Sequence[Path], folder: Path, split: str
) -> tuple[PackedStrings, npt.NDArray[np.int32], list[str]]:
    """Return paths, class numbers and classes from the index files."""
    try:
        entries, class_ids, _ = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        ids, numbers = entries["class_id"], entries["actual_index"]
        template = _PATHS[split]
        paths = PackedStrings.of(
            template.format(id=id_, number=number) for id_, number in zip(ids, numbers, strict=True)
        )
        targets = entries["class_index"].astype(np.int32)
    except (OSError, ValueError, IndexError, EOFError) as error:
        raise DatasetError(f"{files[0]} and the files beside it cannot be read: {error}. Delete them") from error
    places = spread_indices(len(paths), _LOOKED_FOR)
    if not any((folder / paths[place]).is_file() for place in places):
        raise DatasetError(
            f"{files[0]} lists {len(paths)} images, and none of {len(places)} looked for is in {folder}: give another "
            "root or extra, or delete the index files, which are then written anew"
        )
    return paths, targets, class_ids.tolist()


def _write_extra(files: Sequence[Path], found: ImageFolder, split: str) -> None:
    """Write the index files that are missing, as far as the names of the images allow it."""
    class_numbers, class_ids = found.class_numbers, found.classes
    actual = _actual_numbers((found.name(index) for index in range(len(found))), split)
    if actual is None or class_numbers is None:
        logger.warning(
            "DINOv2's index files are not written to %s: they only describe images named as %s",
            files[0].parent,
            _PATHS[split],
        )
        return
    names = _class_names(found.root.parent / _LABELS, class_ids)
    id_type, name_type = (f"<U{max(map(len, words))}" for words in (class_ids, names))
    layout = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", id_type), ("class_name", name_type)]
    entries = np.empty(len(found), np.dtype(layout))
    entries["actual_index"], entries["class_index"] = actual, class_numbers
    of_ids, of_names = np.array(class_ids, id_type), np.array(names, name_type)
    entries["class_id"], entries["class_name"] = of_ids[class_numbers], of_names[class_numbers]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, values in zip(files, (entries, of_ids, of_names), strict=True):
            if not file.is_file():
                _save(file, values)
    except OSError as error:
        logger.warning("DINOv2's index files cannot be written (%s); the folder is searched at each start", error)


def _actual_numbers(paths: Iterable[str], split: str) -> npt.NDArray[np.uint32] | None:
    """Return the numbers in the names of images, or None where one is named otherwise."""
    pattern = {"TRAIN": r"(?P<id>[^/]+)/(?P=id)_(\d+)\.JPEG", "VAL": r"(?P<id>[^/]+)/ILSVRC2012_val_(\d{8})\.JPEG"}
    matches = [re.fullmatch(pattern[split], path) for path in paths]
    if not all(matches):
        return None
    return np.array([int(match[2]) for match in matches if match], np.uint32)


def _class_names(file: Path, class_ids: Sequence[str]) -> list[str]:
    """Return the names of classes as a file of lines `id,name` has them; without one, their ids."""
    if not file.is_file():
        return list(class_ids)
    with file.open(encoding="utf-8", newline="") as lines:
        names = {row[0]: row[1] for row in csv.reader(lines) if len(row) >= 2}
    return [names.get(class_id, class_id) for class_id in class_ids]


def _save(file: Path, values: npt.NDArray[np.generic]) -> None:
    """Write an array under a temporary name and rename it."""
    pending = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with pending.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    pending.rename(file)
