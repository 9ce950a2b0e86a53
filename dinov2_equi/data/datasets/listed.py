"""Images whose paths stand in a list: a text file, a table, or what a pattern finds."""

from __future__ import annotations

import csv
import difflib
import glob
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_equi.data.datasets.base import DatasetError, check_index, spread_indices
from dinov2_equi.data.datasets.encoded import EncodedImages
from dinov2_equi.data.datasets.packed import PackedStrings
from dinov2_equi.data.datasets.stored_index import STORED_FROM, index_places, load_index, store_index
from dinov2_equi.logging.progress import counting

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LIST_SUFFIXES = (".txt", ".lst", ".list")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_LOOKED_FOR = 16  # paths of a list, evenly spread, of which one must exist: looking for all takes minutes
_SHOWN = 5
_COUNTED_AT_ONCE = 1000


class ListedImages(EncodedImages):
    """Images by their paths, which are kept in one array.

    Args:
        paths: Absolute, or below `base`.
        base: What relative paths start from.
        targets: Class number of each image, or None.
        classes: Class names by number.
        num_bytes: Bytes of each file, uint32 [n], 4 GiB and more as 4 GiB; None: not looked for.
        what: What the list is called in messages.
    """

    def __init__(
        self,
        paths: PackedStrings,
        base: Path,
        *,
        targets: npt.NDArray[np.int32] | None = None,
        classes: Sequence[str] = (),
        num_bytes: npt.NDArray[np.uint32] | None = None,
        what: str,
    ) -> None:
        self.paths = paths
        self._base = base
        self.class_numbers = targets
        self.num_bytes = num_bytes
        self._classes = list(classes)
        self._what = what

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def encoded(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self._base / self.name(index)

    def path(self, index: int) -> str:
        """Return the whole path of image `index`."""
        return str(self._base / self.name(index))

    def name(self, index: int) -> str:
        """Return the path of image `index` as it stands in the list."""
        check_index(index, len(self), self._what)
        return self.paths[index]

    @property
    def targets(self) -> list[int] | None:
        """Class number of each image, or None without classes."""
        return None if self.class_numbers is None else self.class_numbers.tolist()

    @property
    def classes(self) -> list[str]:
        """Class names; empty without classes."""
        return self._classes


def read_list(file: Path | str, root: Path | str | None = None) -> ListedImages:
    """Return the images of a text file: one path a line; empty lines and lines that begin with # are passed over.

    Args:
        file: The list.
        root: What relative paths start from; None: the folder of the list.

    Raises:
        DatasetError: The list is missing, empty or no text, or none of its paths exists; says what was found.
    """
    file = _existing_file(file, "a text file with one path a line")
    return _checked(_stored(file, [], lambda: _Listing(_read_lines(file))), file, root)


def _read_lines(file: Path) -> PackedStrings:
    try:
        with file.open(encoding="utf-8") as lines, counting("paths", f"Reading {file}") as count:
            stripped = (line.strip() for line in lines)
            return PackedStrings.of(_counted((line for line in stripped if line and not line.startswith("#")), count))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is no text ({error}); expected one path a line") from error


def _counted(lines: Iterator[str], count: Callable[[int], None]) -> Iterator[str]:
    """Yield the lines, and count them in thousands."""
    for number, line in enumerate(lines, start=1):
        if number % _COUNTED_AT_ONCE == 0:
            count(_COUNTED_AT_ONCE)
        yield line


def read_table(
    file: Path | str, column: str = "path", label: str | None = None, root: Path | str | None = None
) -> ListedImages:
    """Return the images of a table: CSV or TSV with a line of column names, or Parquet.

    Args:
        file: The table; its suffix says which kind.
        column: Where the paths stand.
        label: Where the classes stand; None: `label`, where there is such a column. Classes are sorted, whole numbers
            by value.
        root: What relative paths start from; None: the folder of the table.

    Raises:
        DatasetError: The table is missing, of another kind, has no rows or not that column (the columns are named), or
            none of its paths exists.
    """
    file = _existing_file(file, f"a table ({' '.join(TABLE_SUFFIXES)})")
    return _checked(_stored(file, [column, label], lambda: _read_columns(file, column, label)), file, root)


def _read_columns(file: Path, column: str, label: str | None) -> _Listing:
    read = _read_parquet if file.suffix.lower() == ".parquet" else _read_csv
    columns = read(file, [column, label or "label"], optional=() if label else ("label",))
    paths = PackedStrings.of(columns[0])
    if len(columns) == 1:
        return _Listing(paths)
    classes = _sorted_classes(set(columns[1]))
    number = {name: index for index, name in enumerate(classes)}
    return _Listing(paths, np.fromiter((number[name] for name in columns[1]), np.int32, len(paths)), classes)


def find_images(pattern: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> ListedImages:
    """Return the images that match a pattern, sorted: `*`, `?`, `[a-z]`, and `**` for any depth.

    Args:
        pattern: Of paths.
        suffixes: What the names of images end in.

    Raises:
        DatasetError: Nothing matches, or no image does; says what was found.
    """
    expanded = str(Path(pattern).expanduser())
    folder = re.split(r"[^/]*[*?[]", pattern, maxsplit=1)[0] or "./"
    found = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207 (a Path refuses patterns from the root)
    paths = [path for path in found if path.lower().endswith(suffixes)]
    if not paths:
        shown = ", ".join(Path(path).name for path in found[:_SHOWN])
        matched = f"it matches {len(found)} entries, none an image ({shown})" if found else "it matches nothing"
        raise DatasetError(
            f"no image for the pattern {pattern}: {matched}. Expected files that end in {' '.join(suffixes)}, as "
            f"with {folder}**/*.jpg"
        )
    return ListedImages(PackedStrings.of(paths), Path(), what=pattern)


def _existing_file(file: Path | str, expected: str) -> Path:
    path = Path(file).expanduser()
    if path.is_dir():
        raise DatasetError(
            f"{path} is a folder; expected {expected}. For the images in a folder, give its path alone, without a name "
            "in front"
        )
    if not path.is_file():
        raise DatasetError(f"no such file: {path}; expected {expected}")
    return path


@dataclass(frozen=True)
class _Listing:
    """What a list or a table holds."""

    paths: PackedStrings
    targets: npt.NDArray[np.int32] | None = None
    classes: Sequence[str] = ()


_ARRAYS = ("text", "ends", "targets", "class_text", "class_ends")


def _stored(file: Path, choice: list[str | None], read: Callable[[], _Listing]) -> _Listing:
    """Return what a file lists: from the user's cache, where it was stored and the file has the same size and time."""
    facts = ["list", str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, choice]
    places = index_places(facts)
    arrays = load_index(places, _ARRAYS, lambda arrays: len(arrays["targets"]) in (0, len(arrays["ends"])))
    if arrays is None:
        listing = read()
        if len(listing.paths) < STORED_FROM:
            return listing
        targets = np.zeros(0, np.int32) if listing.targets is None else listing.targets
        names = PackedStrings.of(listing.classes)
        made = (listing.paths.text, listing.paths.ends, targets, names.text, names.ends)
        arrays = store_index(places, dict(zip(_ARRAYS, made, strict=True)))
    names = PackedStrings(arrays["class_text"], arrays["class_ends"])
    paths = PackedStrings(arrays["text"], arrays["ends"])
    return _Listing(
        paths, arrays["targets"] if len(arrays["targets"]) else None, [names[number] for number in range(len(names))]
    )


def _checked(listing: _Listing, file: Path, root: Path | str | None) -> ListedImages:
    """Return the images, once one of some paths exists."""
    paths = listing.paths
    base = file.parent if root is None else Path(root).expanduser()
    if not len(paths):
        raise DatasetError(f"{file} names no image")
    looked_for = [paths[index] for index in spread_indices(len(paths), _LOOKED_FOR)]
    if not any((base / path).is_file() for path in looked_for):
        raise DatasetError(
            f"none of {len(looked_for)} paths looked for exists, of the {len(paths)} in {file}; the first is "
            f"{base / looked_for[0]}. Relative paths start from {base}; add root=FOLDER for another start, as in "
            f"list:path={file.name}:root=/data"
        )
    return ListedImages(paths, base, targets=listing.targets, classes=listing.classes, what=str(file))


def _read_csv(file: Path, names: list[str], optional: tuple[str, ...]) -> list[list[str]]:
    """Return the columns of these names, as far as they are not optional."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        places = _places(next(rows, []), names, optional, file)
        columns: list[list[str]] = [[] for _ in places]
        for row in _full_rows(rows, max(places) + 1, file):
            for column, place in zip(columns, places, strict=True):
                column.append(row[place])
    return columns


def _full_rows(rows: Iterator[list[str]], least: int, file: Path) -> Iterator[list[str]]:
    for number, row in enumerate(rows, start=2):
        if row and len(row) < least:
            raise DatasetError(f"line {number} of {file} has {len(row)} columns; expected at least {least}")
        if row:
            yield row


def _read_parquet(file: Path, names: list[str], optional: tuple[str, ...]) -> list[list[str]]:
    """Return the columns of these names, as far as they are not optional."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DatasetError(f"{file} needs the package pyarrow: pip install pyarrow ({error})") from error
    try:
        known = parquet.read_schema(file).names
        wanted = [known[place] for place in _places(known, names, optional, file)]
        table = parquet.read_table(file, columns=wanted)
    except (OSError, ValueError) as error:  # what pyarrow raises on a damaged file is a ValueError
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{file} is no Parquet file that can be read: {error}") from error
    return [[str(value) for value in table.column(name).to_pylist()] for name in wanted]


def _places(known: list[str], names: list[str], optional: tuple[str, ...], file: Path) -> list[int]:
    """Return where the columns stand."""
    for name in names:
        if name not in known and name not in optional:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise DatasetError(
                f"{file} has no column {name!r}{hint}; its columns are {', '.join(known) or 'none'}. Name others, as "
                f"in table:path={file.name}:column=COLUMN:label=COLUMN"
            )
    return [known.index(name) for name in names if name in known]


def _sorted_classes(names: set[str]) -> list[str]:
    """Return class names in order: whole numbers by value, others by letter."""
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)
