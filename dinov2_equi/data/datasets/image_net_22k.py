"""ImageNet-22k as it is distributed: one tar file for each class."""

from __future__ import annotations

from pathlib import Path

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.tar_shards import TarShards


class ImageNet22k(TarShards):
    """The images in `root/<class>.tar`, such as `n01440764.tar`, read in any order; nothing is unpacked.

    Classes are the names of the tar files, sorted. The index is that of `TarShards`.

    Args:
        root: The folder that holds the tar files.

    Raises:
        DatasetError: The folder is missing or holds no tar file, or one of them is damaged; says what was looked for.
    """

    def __init__(self, root: Path | str) -> None:
        folder = Path(root).expanduser()
        if not folder.is_dir() or next(folder.glob("*.tar"), None) is None:
            raise DatasetError(
                f"ImageNet22k: looked for <class>.tar, such as n01440764.tar, in {folder} and found none. Set root to "
                "the folder with one tar file for each class, as in ImageNet22k:root=<folder>"
            )
        super().__init__(folder / "*.tar")

    @property
    def targets(self) -> list[int]:
        """Class number of each image."""
        targets: list[int] = self.shard_numbers.tolist()
        return targets

    @property
    def classes(self) -> list[str]:
        """Names of the tar files without their suffix."""
        return [shard.stem for shard in self.shards]
