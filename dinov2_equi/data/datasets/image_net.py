"""ImageNet-1k in torchvision's folder layout."""

from __future__ import annotations

from pathlib import Path

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder

_SPLIT_FOLDERS = {"TRAIN": "train", "VAL": "val"}


class ImageNet(ImageFolder):
    """A split of ImageNet: `root/train/<class>/*.JPEG` or `root/val/<class>/*.JPEG`.

    Args:
        root: The folder that holds `train` and `val`.
        split: TRAIN or VAL.
        extra: Accepted because DINOv2's data set strings carry it (its index files); not needed here and not read.

    Raises:
        DatasetError: Unknown split, or a folder is missing or without images; says what was looked for and where.
    """

    def __init__(self, root: Path | str, split: str = "TRAIN", extra: str | None = None) -> None:
        del extra
        if split not in _SPLIT_FOLDERS:
            raise DatasetError(f"ImageNet has the splits {', '.join(_SPLIT_FOLDERS)}; got split={split!r}")
        folder = Path(root).expanduser() / _SPLIT_FOLDERS[split]
        if not folder.is_dir():
            raise DatasetError(
                f"ImageNet, split {split}: looked for the folder {folder} and did not find it. Set root to the folder "
                "that holds train/<class>/ and val/<class>/, as in ImageNet:split=TRAIN:root=<folder>."
            )
        super().__init__(folder)
        self.split = split
