"""Image files named one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinov2_equi.data.datasets.base import DatasetError, check_index
from dinov2_equi.data.datasets.encoded import EncodedImages


class ImageFiles(EncodedImages):
    """The images in a list of files, in its order; they have no classes.

    Args:
        paths: The files; a leading `~` is the home folder.

    Raises:
        DatasetError: No file, or one that does not exist; names it.
    """

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._paths = [Path(path).expanduser() for path in paths]
        if not self._paths:
            raise DatasetError("expected at least one image file, got none")
        missing = [str(path) for path in self._paths if not path.is_file()]
        if missing:
            raise DatasetError(f"no such file: {', '.join(missing)}. Give paths of images.")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def encoded(self, index: int) -> Path:
        """Return the file of image `index`."""
        check_index(index, len(self), "the list of files")
        return self._paths[index]

    def name(self, index: int) -> str:
        """Return the path of image `index` as it was given."""
        return str(self.encoded(index))

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return self.name(index)
