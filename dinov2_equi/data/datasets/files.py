"""Image files named one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, check_index
from dinov2_equi.data.datasets.decode import read_rgb, read_tensor


class ImageFiles:
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

    def load(self, index: int) -> Image.Image:
        """Return image `index` as upright RGB.

        Raises:
            UnreadableImageError: The file cannot be decoded; names the file.
        """
        check_index(index, len(self), "the list of files")
        return read_rgb(self._paths[index])

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        """Return image `index` as uint8 [3, H, W]; large JPEGs are decoded at a fraction of their size."""
        check_index(index, len(self), "the list of files")
        return read_tensor(self._paths[index], min_short_side)

    def name(self, index: int) -> str:
        """Return the path of image `index` as it was given."""
        check_index(index, len(self), "the list of files")
        return str(self._paths[index])

    @property
    def targets(self) -> list[int] | None:
        """None: the images have no classes."""
        return None

    @property
    def classes(self) -> list[str]:
        """No class names."""
        return []
