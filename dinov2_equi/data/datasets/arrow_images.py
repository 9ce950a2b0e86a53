"""Images in a data set that Hugging Face's `datasets` has saved, read through pyarrow alone."""

from __future__ import annotations

import difflib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError, check_index
from dinov2_equi.data.datasets.encoded import EncodedImages
from dinov2_equi.data.datasets.numbered_classes import NumberedClasses

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


class ArrowImages(EncodedImages):
    """A split of what `save_to_disk` writes: Arrow files, memory-mapped, so that a process holds none of the images.

    Args:
        path: The folder that `save_to_disk` has written: of one split, or with a folder for each.
        split: Which of them, where there are several; None: `train`, or the only one.
        column: Where the images stand; None: the only column of images.
        label: Where the classes stand, a `ClassLabel` or whole numbers; None: `label`, where there is such a column.

    Raises:
        DatasetError: The package pyarrow is missing, the folder is no such data set, or has not that split or column
            (those it has are named).
    """

    def __init__(
        self, path: Path | str, split: str | None = None, column: str | None = None, label: str | None = None
    ) -> None:
        self._folder = _folder_of_split(Path(path).expanduser(), split)
        self._features = _read_json(self._folder / _INFO).get("features") or {}
        self._column = _image_column(self._features, column, self._folder)
        self._label = _label_column(self._features, label, self._folder)
        self._chunks: list[Any] = []
        self._process = 0
        chunks = self._open()
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        if not len(self):
            raise DatasetError(f"{self._folder} holds no image")
        self._targets, self._classes = self._read_classes()

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def encoded(self, index: int) -> Path | bytes:
        """Return the bytes of image `index`, or the file where only its path was saved.

        Raises:
            UnreadableImageError: The row holds neither.
        """
        check_index(index, len(self), str(self._folder))
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        value = self._open()[number][index - start].as_py()
        if isinstance(value, bytes):
            return value
        found = value if isinstance(value, dict) else {}
        if found.get("bytes") is not None:
            return bytes(found["bytes"])
        if found.get("path"):
            return self._folder / str(found["path"])
        raise UnreadableImageError(
            f"{self.path(index)} holds no image", path=self.path(index), reason="neither bytes nor a path"
        )

    def name(self, index: int) -> str:
        """Return the name of the folder and the number of the row."""
        check_index(index, len(self), str(self._folder))
        return f"{self._folder.name}/{index}"

    def path(self, index: int) -> str:
        """Return the folder and the number of the row."""
        return f"{self._folder}/{index}"

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image; None without a column of classes."""
        return None if self._targets is None else self._targets.tolist()

    @property
    def classes(self) -> list[str]:
        """Class names of the `ClassLabel`, or the numbers as text."""
        return self._classes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": []}

    def _open(self) -> list[Any]:
        """Return the column of images in its chunks; each process maps the files for itself."""
        if not self._chunks or self._process != os.getpid():
            self._chunks = [chunk for table in self._tables() for chunk in table.column(self._column).chunks]
            self._process = os.getpid()
        return self._chunks

    def _tables(self) -> list[Any]:
        try:
            arrow: Any = importlib.import_module("pyarrow")
        except ImportError as error:
            raise DatasetError(f"{self._folder} needs the package pyarrow: pip install pyarrow ({error})") from error
        files = [entry["filename"] for entry in _read_json(self._folder / _STATE).get("_data_files") or []]
        try:
            return [arrow.ipc.open_stream(arrow.memory_map(str(self._folder / file))).read_all() for file in files]
        except (OSError, ValueError) as error:  # what pyarrow raises on a damaged file is a ValueError
            raise DatasetError(f"{self._folder} cannot be read: {error}. Save the data set again") from error

    def _read_classes(self) -> tuple[np.ndarray | None, list[str]]:
        if self._label is None:
            return None, []
        columns = [table.column(self._label).to_numpy() for table in self._tables()]
        labels = np.concatenate(columns)
        feature = self._features[self._label]
        names = feature.get("names") if isinstance(feature, dict) else None
        if labels.dtype.kind not in "iu" or labels.min() < 0:  # missing ones turn whole numbers into others
            return None, []
        if names:
            return labels.astype(np.int32), list(names)
        numbered = NumberedClasses(labels)
        return np.asarray(numbered.targets, np.int32), numbered.classes


def _folder_of_split(folder: Path, split: str | None) -> Path:
    """Return the folder of one split."""
    if (folder / _STATE).is_file():
        if split is not None:
            raise DatasetError(f"{folder} is a single split; leave out split={split}")
        return folder
    if not (folder / _SPLITS).is_file():
        raise DatasetError(
            f"{folder} is no data set of Hugging Face's `datasets` on disk: expected {_STATE} or {_SPLITS} in it, as "
            "dataset.save_to_disk(folder) writes them"
        )
    known = list(_read_json(folder / _SPLITS).get("splits") or [])
    chosen = split or ("train" if "train" in known else known[0] if len(known) == 1 else "")
    if chosen not in known:
        raise DatasetError(f"{folder} has no split {chosen!r}; its splits are {', '.join(known)}: add split=NAME")
    return folder / chosen


def _image_column(features: dict[str, Any], column: str | None, folder: Path) -> str:
    images = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    if column is not None and column not in features:
        nearest = difflib.get_close_matches(column, features, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise DatasetError(f"{folder} has no column {column!r}{hint}; its columns are {', '.join(features)}")
    if column is None and len(images) != 1:
        raise DatasetError(
            f"{folder} has {len(images)} columns of images ({', '.join(images) or 'none'}), of the columns "
            f"{', '.join(features)}: name one, as in huggingface:path={folder}:column=NAME"
        )
    return column or images[0]


def _label_column(features: dict[str, Any], label: str | None, folder: Path) -> str | None:
    if label is not None and label not in features:
        raise DatasetError(f"{folder} has no column {label!r}; its columns are {', '.join(features)}")
    return label or ("label" if "label" in features else None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read: {error}. Save the data set again with save_to_disk") from error
    return content if isinstance(content, dict) else {}
