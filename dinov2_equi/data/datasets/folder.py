"""Images below a folder, at any depth."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES, LIST_SUFFIXES, TABLE_SUFFIXES, ListedImages
from dinov2_equi.data.datasets.packed import PackedStrings
from dinov2_equi.data.datasets.stored_index import STORED_FROM, Arrays, index_places, load_index, store_index
from dinov2_equi.logging.progress import counting

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_SHOWN_ENTRIES = 5
_MAX_BYTES = 2**32 - 1


class ImageFolder(ListedImages):
    """The images below `root`, sorted by relative path; hidden files and folders are skipped, links are followed.

    Class numbers exist where every image lies in a sub-folder and there are at least two of them: the class is the
    first folder below `root`, classes are sorted by name. Folders that are all named like splits (train, val, test)
    are no classes: their images are used together, and a warning says so.

    What was found is stored in the user's cache where there are `STORED_FROM` images or more. It is used again as long
    as every folder has the time of change that it had; a file that is replaced under its name changes none, and its
    size is not looked at. Nothing is stored while a folder has changed within the last two seconds: a further change
    might leave the same time.

    Args:
        root: The folder; a leading `~` is the home folder.
        suffixes: What the names of images end in.

    Raises:
        DatasetError: The folder is missing, is not a folder, or holds no image; says what was found there.
    """

    def __init__(self, root: Path | str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        self.root = Path(root).expanduser()
        _check_is_folder(self.root)
        places = index_places(["folder", str(self.root.resolve()), suffixes])
        arrays: Arrays | None = load_index(places, _ARRAYS, lambda arrays: _is_current(arrays, self.root))
        if arrays is None:
            arrays = _scan(self.root, suffixes)
            if len(arrays["ends"]) >= STORED_FROM and arrays["folder_times"].max() < arrays["started"][0] - _SETTLED_NS:
                arrays = store_index(places, arrays)
        if not len(arrays["ends"]):
            raise DatasetError(_describe_no_images(self.root, suffixes))
        classes = _classes(arrays, self.root)
        super().__init__(
            PackedStrings(arrays["text"], arrays["ends"]),
            self.root,
            targets=arrays["groups"] if classes else None,
            classes=classes,
            num_bytes=arrays["bytes"],
            what=str(self.root),
        )


# ----------------------------------------------------------------------------------------------------------- the index

_ARRAYS = (
    *("text", "ends", "bytes", "groups", "group_text", "group_ends"),
    *("folder_text", "folder_ends", "folder_times", "started"),
)
_SETTLED_NS = 2 * 10**9


def _is_current(arrays: Arrays, root: Path) -> bool:
    """Return whether arrays fit each other, and every folder still has the time at which it was searched."""
    folders = PackedStrings(arrays["folder_text"], arrays["folder_ends"])
    if len(arrays["ends"]) != len(arrays["bytes"]) or len(folders) != len(arrays["folder_times"]):
        return False
    times = (_time_of_change(root / folders[number]) for number in range(len(folders)))
    return all(now == then for now, then in zip(times, arrays["folder_times"].tolist(), strict=True))


def _time_of_change(folder: Path) -> int:
    """Return when a folder was changed, ns; -1 where it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _scan(root: Path, suffixes: tuple[str, ...]) -> Arrays:
    """Return what is below a folder.

    `text` and `ends`: the paths, packed; `bytes`: sizes of the files; `groups`: number of the first folder of each
    path among `group_text` and `group_ends`, empty where an image has none; `folder_*`: the folders that were searched,
    and when they were changed; `started`: when the search was started, ns.
    """
    started = time.time_ns()
    found: list[tuple[str, int]] = []
    folders: list[str] = []
    times = array("q")
    with counting("images", f"Searching {root}") as count:
        for folder, images in _folders(root, suffixes):
            folders.append(folder)
            times.append(_time_of_change(root / folder))
            found += images
            count(len(images))
    found.sort()
    packed, searched = PackedStrings.of(path for path, _ in found), PackedStrings.of(folders)
    first = [path.partition("/")[0] if "/" in path else "" for path, _ in found]
    names = sorted(set(first))
    number = {name: place for place, name in enumerate(names)}
    groups = [] if "" in number else [number[name] for name in first]
    of_groups = PackedStrings.of(names if groups else [])
    return {
        "text": packed.text,
        "ends": packed.ends,
        "bytes": np.fromiter((min(size, _MAX_BYTES) for _, size in found), np.uint32, len(found)),
        "groups": np.array(groups, np.int32),
        "group_text": of_groups.text,
        "group_ends": of_groups.ends,
        "folder_text": searched.text,
        "folder_ends": searched.ends,
        "folder_times": np.frombuffer(times.tobytes(), np.int64),
        "started": np.array([started], np.int64),
    }


def _check_is_folder(root: Path) -> None:
    if not root.exists():
        parent = next(path for path in (root, *root.absolute().parents) if path.exists())
        raise DatasetError(f"no such folder: {root} (of that path, {parent} exists). Give a folder that holds images.")
    if not root.is_dir():
        raise DatasetError(f"{root} is a file, not a folder. Give a folder that holds images.")


def _folders(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield each folder, and path and bytes of its images, all below `root` and with forward slashes.

    Each real folder is entered once. No object is made for a path: that costs three times as much as asking for a size.
    """
    entered: set[str] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        real_folder = os.path.realpath(root / folder)
        if real_folder in entered:  # a link that leads back up
            continue
        entered.add(real_folder)
        start = f"{folder}/" if folder else ""
        images, subfolders = [], []
        for entry in _visible_entries(root / folder):
            if _is_folder(entry):
                subfolders.append(start + entry.name)
            elif entry.name.lower().endswith(suffixes):
                images.append((start + entry.name, _num_bytes(entry)))
        # Sorted, so that of two links to one folder it is always the same that counts.
        pending += sorted(subfolders, reverse=True)
        yield folder or ".", images


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder and is not hidden; a folder that cannot be read is passed over with a warning."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        logger.warning("the folder %s cannot be read, its images are left out: %s", folder, error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or leads to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _num_bytes(entry: os.DirEntry[str]) -> int:
    """Return the size of a file; 0 where a link leads nowhere, which is a bad image once it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def _classes(arrays: Arrays, root: Path) -> list[str]:
    """Return class names in the order of `groups`; empty where the folders are no classes."""
    names = PackedStrings(arrays["group_text"], arrays["group_ends"])
    if len(names) < 2:
        return []
    classes = [names[number] for number in range(len(names))]
    if all(name.lower() in _SPLIT_FOLDERS for name in classes):
        logger.warning(
            "%s holds the folders %s: they look like splits, not classes, and are used together without class "
            "numbers. To use one of them, give its path, such as %s.",
            root,
            ", ".join(classes),
            root / classes[0],
        )
        return []
    return classes


def _describe_no_images(root: Path, suffixes: tuple[str, ...]) -> str:
    """Return the error message for a folder without images: what it holds, and what is expected."""
    entries = sorted(entry.name for entry in root.iterdir())
    if entries:
        shown = ", ".join(entries[:_SHOWN_ENTRIES]) + (", ..." if len(entries) > _SHOWN_ENTRIES else "")
        found = f"it holds {shown}" if len(entries) <= _SHOWN_ENTRIES else f"it holds {len(entries)} entries ({shown})"
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
