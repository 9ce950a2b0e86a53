"""Images below a folder, at any depth."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES, LIST_SUFFIXES, TABLE_SUFFIXES, ListedImages
from dinov2_equi.data.datasets.packed import PackedStrings

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_SHOWN_ENTRIES = 5


class ImageFolder(ListedImages):
    """The images below `root`, sorted by relative path; hidden files and folders are skipped, links are followed.

    Class numbers exist where every image lies in a sub-folder and there are at least two of them: the class is the
    first folder below `root`, classes are sorted by name. Folders that are all named like splits (train, val, test)
    are no classes: their images are used together, and a warning says so.

    Args:
        root: The folder; a leading `~` is the home folder.
        suffixes: What the names of images end in.

    Raises:
        DatasetError: The folder is missing, is not a folder, or holds no image; says what was found there.
    """

    def __init__(self, root: Path | str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        self.root = Path(root).expanduser()
        _check_is_folder(self.root)
        paths = sorted(_image_paths(self.root, suffixes))
        if not paths:
            raise DatasetError(_describe_no_images(self.root, suffixes))
        numbers, classes = _classes_of_paths(paths, self.root)
        targets = None if numbers is None else np.array(numbers, np.int32)
        super().__init__(PackedStrings.of(paths), self.root, targets=targets, classes=classes, what=str(self.root))


def _check_is_folder(root: Path) -> None:
    if not root.exists():
        parent = next(path for path in (root, *root.absolute().parents) if path.exists())
        raise DatasetError(f"no such folder: {root} (of that path, {parent} exists). Give a folder that holds images.")
    if not root.is_dir():
        raise DatasetError(f"{root} is a file, not a folder. Give a folder that holds images.")


def _image_paths(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the path below `root`, with forward slashes, of every image; each real folder is entered once."""
    entered: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in entered:  # a link that leads back up
            subfolders.clear()
            continue
        entered.add(real_folder)
        # Sorted, so that of two links to one folder it is always the same that counts.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        for file in files:
            if file.lower().endswith(suffixes) and not file.startswith("."):
                yield (relative / file).as_posix()


def _classes_of_paths(paths: list[str], root: Path) -> tuple[list[int] | None, list[str]]:
    """Return (class number of each path, class names), or (None, []) where the folders are no classes."""
    parts = [PurePosixPath(path).parts for path in paths]
    if any(len(part) < 2 for part in parts):
        return None, []
    classes = sorted({part[0] for part in parts})
    if len(classes) < 2:
        return None, []
    if all(name.lower() in _SPLIT_FOLDERS for name in classes):
        logger.warning(
            "%s holds the folders %s: they look like splits, not classes, and are used together without class "
            "numbers. To use one of them, give its path, such as %s.",
            root,
            ", ".join(classes),
            root / classes[0],
        )
        return None, []
    number = {name: index for index, name in enumerate(classes)}
    return [number[part[0]] for part in parts], classes


def _describe_no_images(root: Path, suffixes: tuple[str, ...]) -> str:
    """Return the error message for a folder without images: what it holds, and what is expected."""
    entries = sorted(entry.name for entry in root.iterdir())
    if entries:
        shown = ", ".join(entries[:_SHOWN_ENTRIES]) + (", ..." if len(entries) > _SHOWN_ENTRIES else "")
        found = f"it holds {len(entries)} entries ({shown})"
    else:
        found = "it is empty"
    lists = [name for name in entries if name.endswith((*LIST_SUFFIXES, *TABLE_SUFFIXES))]
    if any(name.endswith(".tar") for name in entries):
        advice = f"For tar shards give {root / '*.tar'}."
    elif lists:
        advice = f"If {lists[0]} lists the images, give {root / lists[0]}."
    elif any(name.endswith(".npy") for name in entries):
        advice = "To read arrays (.npy), set data.in_channels to their channels."
    else:
        advice = ""
    expected = " ".join(suffixes)
    return (
        f"no image in the folder {root} or below it: {found}. Give a folder that holds images ({expected}). {advice}"
    ).strip()
