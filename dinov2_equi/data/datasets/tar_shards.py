"""Images in tar files, in WebDataset's layout, read in any order through an index that is written once.

A shard is an uncompressed tar file. Files that share their path up to the first dot of the name belong together:
`0001.jpg` is an image, `0001.cls` its class, a whole number as text. Everything else is passed over.

Source: layout after WebDataset, github.com/webdataset/webdataset.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError, check_index
from dinov2_equi.data.datasets.blocks import Blocks
from dinov2_equi.data.datasets.encoded import EncodedImages
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES
from dinov2_equi.data.datasets.numbered_classes import NO_CLASS, NumberedClasses
from dinov2_equi.data.datasets.packed import PackedStrings
from dinov2_equi.data.datasets.stored_index import Arrays, index_places, load_index, store_index
from dinov2_equi.logging.progress import tracked

ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4")])
"""Where an image lies: 16 bytes."""

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class _Index:
    """What the shards hold; the arrays are memory-mapped files, which all workers share."""

    entries: npt.NDArray[np.void]
    """`ENTRY` [n]."""
    names: PackedStrings
    labels: npt.NDArray[np.int32]
    """[n], -1 where an image has no class."""


class TarShards(EncodedImages):
    """The images of tar shards, in the order of the shards and within them.

    The index lies in `.dinov2_equi_index` beside the first shard, or in the user's cache where that folder cannot be
    written to. It is used again as long as names, sizes and times of the shards are the same.

    Args:
        pattern: Path of one shard, or of several: with wildcards, or numbers as in `train-{000000..000146}.tar`.
        suffixes: What the names of images end in.
        buffer: Shards that are open together: a training reads shard after shard, in random order, and shuffles the
            images of so many. None: images in any order, whatever shard they lie in.

    Raises:
        DatasetError: No shard, a compressed or damaged one, or no image in them; says what was found and what to do.
    """

    def __init__(
        self, pattern: Path | str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, buffer: int | None = None
    ) -> None:
        shards = _find_shards(str(pattern))
        self._take_index(_load_or_build(shards, suffixes), shards, f"{len(shards)} shards of {pattern}", suffixes)
        self.buffer = buffer

    def _take_index(self, arrays: Arrays, shards: Sequence[Path], what: str, suffixes: tuple[str, ...]) -> None:
        self.shards = list(shards)
        self._index = _Index(arrays["entries"], PackedStrings(arrays["text"], arrays["ends"]), arrays["labels"])
        if not len(self._index.entries):
            raise DatasetError(f"no image ({' '.join(suffixes)}) in {what}")
        self._numbered = NumberedClasses(self._index.labels)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index.entries)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of image `index`.

        Raises:
            UnreadableImageError: The shard cannot be read; names it and the file in it.
        """
        check_index(index, len(self), "the shards")
        entry = self._index.entries[index]
        try:
            descriptor = self._open(int(entry["shard"]))
            try:
                return os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
            finally:
                os.close(descriptor)
        except OSError as error:
            path = self.path(index)
            raise UnreadableImageError(f"cannot read {path}: {error}", path=path, reason=str(error)) from error

    def _open(self, shard: int) -> int:
        """Return an open file descriptor of a shard."""
        return os.open(self.shards[shard], os.O_RDONLY)

    def blocks(self) -> Blocks | None:
        """Return the shards as blocks that a training takes one after the other; None: images in any order."""
        if self.buffer is None:
            return None
        return Blocks(np.bincount(self.shard_numbers, minlength=len(self.shards)), self.buffer)

    def name(self, index: int) -> str:
        """Return the name of the shard and the path of image `index` in it."""
        check_index(index, len(self), "the shards")
        return f"{self.shards[int(self._index.entries[index]['shard'])].name}/{self._index.names[index]}"

    @property
    def shard_numbers(self) -> npt.NDArray[np.uint32]:
        """Number of the shard of each image, [n], as they follow each other in `shards`."""
        numbers: npt.NDArray[np.uint32] = self._index.entries["shard"]
        return numbers

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image; None unless every image has a class."""
        return self._numbered.targets

    @property
    def classes(self) -> list[str]:
        """The numbers in the `.cls` files, as text."""
        return self._numbered.classes

    def path(self, index: int) -> str:
        """Return the path of the shard of image `index`, with its own in it."""
        return str(self.shards[int(self._index.entries[index]["shard"])].parent / self.name(index))


def _find_shards(pattern: str) -> list[Path]:
    """Return the shards that a pattern names, in the order of their names."""
    expanded = os.fspath(Path(pattern).expanduser())
    if expanded.endswith(_COMPRESSED):
        raise DatasetError(f"{pattern} is compressed: its images cannot be read in any order. Unpack it to a plain tar")
    candidates = list(expand_braces(expanded))
    found = [path for name in candidates for path in ([name] if Path(name).is_file() else _matches(name))]
    missing = [name for name in candidates if not glob.has_magic(name) and not Path(name).is_file()]
    if missing or not found:
        raise DatasetError(
            f"no such shard: {', '.join(missing[:3]) or pattern} ({len(found)} others were found). Give the path of a "
            "tar file, a pattern such as shards/*.tar, or numbers such as shards/train-{000000..000146}.tar"
        )
    return [Path(path) for path in found]


def _matches(pattern: str) -> list[str]:
    found = glob.glob(pattern)  # noqa: PTH207 (a Path refuses patterns from the root)
    return sorted(path for path in found if Path(path).is_file())


def expand_braces(text: str) -> Iterator[str]:
    """Yield the text with each {first..last} replaced by every number, as wide as the first."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from expand_braces(f"{text[: match.start()]}{number:0{len(match[1])}d}{text[match.end() :]}")


# ----------------------------------------------------------------------------------------------------------- the index


INDEX_ARRAYS = ("entries", "text", "ends", "labels")


def _load_or_build(shards: Sequence[Path], suffixes: tuple[str, ...]) -> Arrays:
    """Return the index of these shards, from the disk where it is there."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    places = index_places([suffixes, facts], beside=shards[0].parent)
    return load_index(places, INDEX_ARRAYS, fit_each_other) or store_index(places, _scan(shards, suffixes))


def fit_each_other(arrays: Arrays) -> bool:
    """Return whether the arrays of an index belong together."""
    entries = arrays["entries"]
    return entries.dtype == ENTRY and len(entries) == len(arrays["ends"]) == len(arrays["labels"])


def _scan(shards: Sequence[Path], suffixes: tuple[str, ...]) -> Arrays:
    """Return the index of the shards, from the headers in them."""
    shown = tracked(shards, f"Indexing {len(shards)} shards")
    return join_scans([scan_shard(number, shard, suffixes) for number, shard in enumerate(shown)])


def scan_shard(number: int, shard: Path, suffixes: tuple[str, ...]) -> Arrays:
    """Return the index of shard `number` alone, from the headers in the file."""
    offsets, sizes, labels = array("Q"), array("L"), array("l")
    names: list[str] = []
    for image, label in _images_of(shard, suffixes):
        offsets.append(image.offset_data)
        sizes.append(image.size)
        labels.append(label)
        names.append(image.name)
    entries = np.empty(len(offsets), ENTRY)
    entries["offset"], entries["size"], entries["shard"] = offsets, sizes, number
    packed = PackedStrings.of(names)
    return {"entries": entries, "text": packed.text, "ends": packed.ends, "labels": np.array(labels, np.int32)}


def join_scans(parts: Sequence[Arrays]) -> dict[str, npt.NDArray[Any]]:
    """Return the index of several shards, in their order."""
    lengths = np.concatenate([np.diff(part["ends"], prepend=0) for part in parts])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("entries", "text", "labels")}
    return {**joined, "ends": np.cumsum(lengths, dtype=np.int64)}


def _images_of(shard: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each image of a shard with its class.

    Raises:
        DatasetError: The shard is damaged, or a `.cls` file holds no number.
    """
    key, image, label = "", None, NO_CLASS
    shard_size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                _check_whole(member, shard, shard_size)
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if f"{folder}/{stem}" != key:
                    if image is not None:
                        yield image, label
                    key, image, label = f"{folder}/{stem}", None, NO_CLASS
                if suffix == "cls":
                    label = _label(tar, member, shard)
                elif image is None and name.lower().endswith(suffixes):
                    image = member
    except tarfile.TarError as error:
        raise DatasetError(f"the shard {shard} is no whole uncompressed tar file: {error}. Copy it again") from error
    if image is not None:
        yield image, label


def _check_whole(member: tarfile.TarInfo, shard: Path, shard_size: int) -> None:
    if member.offset_data + member.size > shard_size:
        raise DatasetError(f"the shard {shard} is cut off within {member.name}. Copy it again")
    if member.size >= 2**32:
        raise DatasetError(f"{member.name} in the shard {shard} has {member.size} bytes; an image may have 4 GiB")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    text = b"" if file is None else file.read(64)
    try:
        label = int(text)
    except ValueError:
        raise DatasetError(f"{member.name} in the shard {shard} should hold a whole number; got {text!r}") from None
    if label < 0:
        raise DatasetError(f"{member.name} in the shard {shard} should hold a class number >= 0; got {label}")
    return label
