"""Images in an LMDB file: each value an encoded image."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError, check_index
from dinov2_equi.data.datasets.encoded import EncodedImages
from dinov2_equi.data.datasets.numbered_classes import NO_CLASS, NumberedClasses
from dinov2_equi.data.datasets.packed import PackedStrings
from dinov2_equi.data.datasets.stored_index import Arrays, index_places, load_index, store_index

_ARRAYS = ("text", "ends", "labels")
_CLASS_SUFFIX = b".cls"
_INTERNAL = b"__"


class LmdbImages(EncodedImages):
    """The values of an LMDB file in the order of their keys; each is a whole JPEG, PNG or other image file.

    The value of a key `<name>.cls` is the class, a whole number as text, of the key that has the same name up to its
    last dot, as in WebDataset. Keys that begin with `__` (`__len__`, `__keys__`) are passed over, whatever they hold:
    nothing is unpickled. The list of keys is stored as the index of tar shards is.

    Args:
        path: The folder with `data.mdb`, or the file itself.

    Raises:
        DatasetError: The package lmdb is missing, there is no such file, it is no LMDB file, or it holds no image; says
            what was found.
    """

    def __init__(self, path: Path | str) -> None:
        self._file = _data_file(Path(path).expanduser().resolve())
        arrays = self._index()
        self._keys = PackedStrings(arrays["text"], arrays["ends"])
        if not len(self._keys):
            raise DatasetError(f"{self._file} holds no key of an image")
        self._numbered = NumberedClasses(arrays["labels"])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._keys)

    def encoded(self, index: int) -> bytes:
        """Return the value of key number `index`.

        Raises:
            UnreadableImageError: The key is gone or the file is damaged; names both.
        """
        key = self.name(index)
        try:
            with _open(self._file).begin() as transaction:
                value = transaction.get(os.fsencode(key))
        except _library(self._file).Error as error:
            raise UnreadableImageError(
                f"cannot read {self.path(index)}: {error}", path=self.path(index), reason=str(error)
            ) from error
        if value is None:
            raise UnreadableImageError(
                f"cannot read {self.path(index)}: the key is gone", path=self.path(index), reason="the key is gone"
            )
        return bytes(value)

    def name(self, index: int) -> str:
        """Return key number `index`."""
        check_index(index, len(self), str(self._file))
        return self._keys[index]

    def path(self, index: int) -> str:
        """Return the file and key number `index`."""
        return f"{self._file}/{self.name(index)}"

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image; None unless every image has a class."""
        return self._numbered.targets

    @property
    def classes(self) -> list[str]:
        """The class numbers, as text."""
        return self._numbered.classes

    def _index(self) -> Arrays:
        facts = ["lmdb", str(self._file), self._file.stat().st_size, self._file.stat().st_mtime_ns]
        places = index_places(facts, beside=self._file.parent)
        return load_index(places, _ARRAYS, _fit_each_other) or store_index(places, self._scan())

    def _scan(self) -> Arrays:
        """Return the keys of images, packed, and their labels."""
        keys: list[str] = []
        labels: dict[str, int] = {}
        with _open(self._file).begin() as transaction, transaction.cursor() as cursor:
            for key in cursor.iternext(values=False):
                if key.endswith(_CLASS_SUFFIX):
                    labels[os.fsdecode(key[: -len(_CLASS_SUFFIX)])] = self._label(key, transaction.get(key))
                elif not key.startswith(_INTERNAL):
                    keys.append(os.fsdecode(key))
        packed = PackedStrings.of(keys)
        of_keys = (labels.get(key, labels.get(key.rpartition(".")[0], NO_CLASS)) for key in keys)
        return {"text": packed.text, "ends": packed.ends, "labels": np.fromiter(of_keys, np.int32, len(keys))}

    def _label(self, key: bytes, value: bytes) -> int:
        if not value.strip().isdigit():
            raise DatasetError(f"{key!r} in {self._file} should hold a class number >= 0; got {value[:64]!r}")
        return int(value)


_environments: dict[Path, tuple[int, Any]] = {}
"""Open files, each with the process that has opened it: LMDB opens a file once in a process."""


def _open(file: Path) -> Any:
    """Return an open file; a forked process closes what it has inherited, and opens it for itself."""
    process, environment = _environments.get(file, (0, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()
        library = _library(file)
        try:
            environment = library.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
        except library.Error as error:
            raise DatasetError(f"{file} is no LMDB file that can be read: {error}") from error
        _environments[file] = (os.getpid(), environment)
    return environment


def _library(file: Path) -> Any:
    try:
        return importlib.import_module("lmdb")
    except ImportError as error:
        raise DatasetError(f"{file} needs the package lmdb: pip install lmdb ({error})") from error


def _data_file(path: Path) -> Path:
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        raise DatasetError(f"no LMDB file at {path}: expected a folder with data.mdb, or the file itself")
    return file


def _fit_each_other(arrays: Arrays) -> bool:
    return len(arrays["ends"]) == len(arrays["labels"])
