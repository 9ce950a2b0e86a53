"""Images beside label images (depth maps, class maps): how files are paired, and how both are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES

TRAIN, VAL = "train", "val"
SPLITS = (TRAIN, VAL)
_SPLIT_FOLDERS = {TRAIN: ("train", "training"), VAL: ("val", "validation", "test")}
VAL_SHARE = 0.2
"""Share of the files, the last ones by name, that stand for a missing validation folder."""


@dataclass(frozen=True)
class Pair:
    """The file of an image and the file of its labels."""

    image: Path
    label: Path


@dataclass(frozen=True)
class PairNames:
    """How image and label files are told apart where only names do it, and how folders of labels are called.

    Attributes:
        image_folders: names of the folder of images.
        label_folders: names of the folder of labels.
        label_marks: parts of a name that a label file has and its image has not; `.depth` of `a.depth.png`.
        image_marks: the same the other way round; `.color` of `a.color.jpg`.
    """

    image_folders: tuple[str, ...]
    label_folders: tuple[str, ...]
    label_marks: tuple[str, ...]
    image_marks: tuple[str, ...]


def find_pairs(root: Path, split: str, names: PairNames) -> list[Pair]:
    """Return the pairs of a split of a folder, sorted by name.

    Understood are `root/IMAGES/[SPLIT/]x.jpg` with `root/LABELS/[SPLIT/]x.png`, `root/SPLIT/IMAGES/...`, and both in
    one folder with marks in their names, `x.color.jpg` and `x.depth.png`. Without folders of splits the last fifth of
    the files by name is the validation set: of a video these are frames apart from the others.

    Raises:
        DatasetError: no such folder, no pairs, or an image without labels; says what was looked for.
    """
    if split not in SPLITS:
        raise DatasetError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
    forms = (
        f"one of {', '.join(names.image_folders)} beside one of {', '.join(names.label_folders)}, with folders "
        f"{' or '.join(_SPLIT_FOLDERS[split])} in them or around them, or files named alike but for "
        f"{' or '.join(names.label_marks)}"
    )
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}; it would hold {forms}")
    folders = _folders(root, split, names)
    if folders is not None:
        images, labels, has_split = folders
        pairs = _by_stem(images, labels, names)
    else:
        has_split, inner = False, root
        for folder in _SPLIT_FOLDERS[split]:
            if (root / folder).is_dir():
                has_split, inner = True, root / folder
                break
        pairs = _by_marks(inner, names)
    if not pairs:
        raise DatasetError(f"no pairs of images and labels in {root}: looked for {forms}")
    if has_split:
        return pairs
    num_train = len(pairs) - max(round(VAL_SHARE * len(pairs)), 1)
    if num_train < 1:
        raise DatasetError(f"{root} has one pair only, too few to divide into training and validation")
    return pairs[:num_train] if split == TRAIN else pairs[num_train:]


def _folders(root: Path, split: str, names: PairNames) -> tuple[Path, Path, bool] | None:
    """Return the folders of images and labels and whether they are those of the split alone."""
    images = next((root / name for name in names.image_folders if (root / name).is_dir()), None)
    labels = next((root / name for name in names.label_folders if (root / name).is_dir()), None)
    if images is not None and labels is not None:
        for folder in _SPLIT_FOLDERS[split]:
            if (images / folder).is_dir() and (labels / folder).is_dir():
                return images / folder, labels / folder, True
        return images, labels, False
    for folder in _SPLIT_FOLDERS[split]:
        if (root / folder).is_dir():
            found = _folders(root / folder, split, names)
            return None if found is None else (found[0], found[1], True)
    return None


def _by_stem(images: Path, labels: Path, names: PairNames) -> list[Pair]:
    """Return the pairs of two folders: the same path below them, but for the ending and marks."""
    found = {_key(path.relative_to(labels), names): path for path in image_files(labels)}
    pairs = []
    for image in image_files(images):
        label = found.get(_key(image.relative_to(images), names))
        if label is None:
            raise DatasetError(f"the image {image} has no labels: looked below {labels} for a file of the same name")
        pairs.append(Pair(image, label))
    return pairs


def _by_marks(folder: Path, names: PairNames) -> list[Pair]:
    """Return the pairs in one folder, by the marks in their names; files without a partner are left out."""
    files = image_files(folder)
    labels = {
        _key(path.relative_to(folder), names): path
        for path in files
        if any(mark in path.name for mark in names.label_marks)
    }
    taken = set(labels.values())
    keys = ((path, _key(path.relative_to(folder), names)) for path in files if path not in taken)
    return [Pair(path, labels[key]) for path, key in keys if key in labels]


def _key(path: Path, names: PairNames) -> str:
    """Return the path without its ending and the first mark in its name."""
    stem = path.stem
    for mark in (*names.label_marks, *names.image_marks):
        if mark in stem:
            stem = stem.replace(mark, "", 1)
            break
    return (path.parent / stem).as_posix()


def image_files(folder: Path) -> list[Path]:
    """Return all image files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def read_label_image(path: Path) -> npt.NDArray[np.int32]:
    """Return the values of a grey or palette image as they are stored, int32 [H, W]; see `stored_values`."""
    return stored_values(path).astype(np.int32)


def stored_values(path: Path) -> npt.NDArray[np.integer[Any] | np.bool_]:
    """Return the values [H, W] of a grey or palette image in their own format: indices of a palette, 16 bits too.

    Raises:
        UnreadableImageError: the file cannot be read, or has colours instead of one channel; names the file.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImageError(f"cannot read the label image {path}: {type(error).__name__}: {error}") from error
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_):
        raise UnreadableImageError(
            f"expected {path} to have one channel of whole numbers, got {list(values.shape)} of {values.dtype}"
        )
    return values


def check_same_size(image: Sequence[int], label: Sequence[int], pair: Pair) -> None:
    """Refuse labels of another size than the image; both (H, W).

    Raises:
        DatasetError: names the files.
    """
    if tuple(image) != tuple(label):
        raise DatasetError(
            f"{pair.label} is {label[1]} x {label[0]} pixels, but its image {pair.image} is {image[1]} x {image[0]}; "
            "labels must have the size of the image"
        )


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a list of files that are not empty.

    Raises:
        DatasetError: the file is missing or empty; says what it is for.
    """
    if not path.is_file():
        raise DatasetError(f"{what}: there is no file {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DatasetError(f"{what}: {path} is empty")
    return lines


def check_exist(pairs: Iterable[Pair], what: str) -> list[Pair]:
    """Return pairs whose files all exist.

    Raises:
        DatasetError: says how many are missing, and names the first.
    """
    pairs = list(pairs)
    missing = [path for pair in pairs for path in (pair.image, pair.label) if not path.is_file()]
    if missing:
        raise DatasetError(f"{what}: {len(missing)} of {2 * len(pairs)} files are missing, the first is {missing[0]}")
    return pairs
