"""Images with depth maps: NYUv2 and KITTI as they are used for monocular depth, and any folder of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb
from dinov2_equi.data.datasets.pairs import (
    TRAIN,
    Pair,
    PairNames,
    check_exist,
    check_same_size,
    find_pairs,
    image_files,
    read_lines,
    stored_values,
)

Box = tuple[int, int, int, int]
"""First row, first column, row and column behind the last."""

NAMES = PairNames(
    image_folders=("images", "image", "rgb", "color"),
    label_folders=("depth", "depths", "depth_maps", "annotations", "labels"),
    label_marks=("sync_depth_", ".depth", "_depth", "depth_", "-depth"),
    image_marks=(".color", "_color", "rgb_", "_rgb", ".rgb", "color_", "-color", "-rgb"),
)
INVALID_16_BIT = 65535
"""What depth cameras write where they see nothing, beside 0."""

_LARGEST_8_BIT = 255
_LEAST_REACH = 1.0
"""Metres: no depth map of a scene ends before, so that 8 bits were meant in other units."""

KITTI_SIZE = (352, 1216)
_NYU_SIZE = (480, 640)
_NYU_BORDER: Box = (45, 43, 472, 608)


@dataclass(frozen=True)
class DepthSet:
    """Images with depth maps in metres.

    Attributes:
        pairs: the files.
        units_per_metre: value of the depth images at one metre.
        min_depth: metres; what is nearer is not measured.
        max_depth: metres; what is farther is not measured, and no prediction goes beyond.
        crop: returns the part of a depth map of (H, W) pixels that is measured; None: all of it.
        window: returns the part of an image and its depth map that is used at all; None: all of it.
    """

    pairs: list[Pair]
    units_per_metre: float = 1000.0
    min_depth: float = 1e-3
    max_depth: float = 10.0
    crop: Callable[[int, int], Box] | None = None
    window: Callable[[int, int], Box] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.pairs[index].image)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 [3, H, W], and its depth, float32 [1, H, W] in metres, 0 where it is unknown.

        Raises:
            DatasetError: a file cannot be read, the two differ in size, or 8 bits do not reach far; names the file.
        """
        pair = self.pairs[index]
        image = image_to_tensor(read_rgb(pair.image))
        values = self._depth_values(pair.label)
        check_same_size(image.shape[-2:], values.shape, pair)
        known = np.where(values == INVALID_16_BIT, 0, values) / self.units_per_metre
        depth = torch.from_numpy(known.astype(np.float32)).unsqueeze(0)  # [1, H, W]
        if self.window is None:
            return image, depth
        top, left, bottom, right = self.window(*image.shape[-2:])
        return image[:, top:bottom, left:right], depth[:, top:bottom, left:right]

    def _depth_values(self, path: Path) -> npt.NDArray[np.int32]:
        """Return the values of a depth map.

        Raises:
            DatasetError: it has 8 bits, which in these units end before `_LEAST_REACH`.
        """
        values = stored_values(path)
        reach = _LARGEST_8_BIT / self.units_per_metre
        if values.dtype.itemsize == 1 and reach < _LEAST_REACH:
            raise DatasetError(
                f"{path} has 8 bits a pixel, which end at {reach:.2g} m with {self.units_per_metre:g} units a metre: "
                "expected 16 bits; for 8 bits that are meant, give their --units-per-metre"
            )
        return values.astype(np.int32)

    def is_measured(self, depth: Tensor) -> Tensor:
        """Return where depth [..., H, W] is known, in range and inside the crop, bool of the same shape."""
        inside = torch.zeros_like(depth, dtype=torch.bool)
        top, left, bottom, right = (0, 0, *depth.shape[-2:]) if self.crop is None else self.crop(*depth.shape[-2:])
        inside[..., top:bottom, left:right] = True
        return inside & (depth > self.min_depth) & (depth < self.max_depth)


def eigen_crop_nyu(height: int, width: int) -> Box:
    """Return Eigen's crop of NYUv2: rows 45 to 470 and columns 41 to 600 of 480 x 640 pixels, scaled to other sizes."""
    return _scaled((45, 41, 471, 601), height, width)


def garg_crop(height: int, width: int) -> Box:
    """Return Garg's crop of KITTI (Garg et al. 2016, arXiv 1603.04992)."""
    return int(0.40810811 * height), int(0.03594771 * width), int(0.99189189 * height), int(0.96405229 * width)


def eigen_crop_kitti(height: int, width: int) -> Box:
    """Return Eigen's crop of KITTI (Eigen et al. 2014, arXiv 1406.2283)."""
    return int(0.3324324 * height), int(0.0359477 * width), int(0.91351351 * height), int(0.96405229 * width)


CROPS = {"garg": garg_crop, "eigen": eigen_crop_kitti, "eigen_nyu": eigen_crop_nyu, "none": None}


def kitti_window(height: int, width: int) -> Box:
    """Return the KITTI benchmark's window: 352 x 1216 pixels at the bottom, centred.

    Raises:
        DatasetError: the image is smaller.
    """
    rows, columns = KITTI_SIZE
    if height < rows or width < columns:
        raise DatasetError(f"expected KITTI images of at least {columns} x {rows} pixels, got {width} x {height}")
    left = (width - columns) // 2
    return height - rows, left, height, left + columns


def _nyu_border(height: int, width: int) -> Box:
    """Return an image of NYUv2 without the white frame that registration leaves around it."""
    return _scaled(_NYU_BORDER, height, width)


def _scaled(box: Box, height: int, width: int) -> Box:
    rows, columns = height / _NYU_SIZE[0], width / _NYU_SIZE[1]
    return round(box[0] * rows), round(box[1] * columns), round(box[2] * rows), round(box[3] * columns)


# ------------------------------------------------------------------------------------------------------------- layouts


def depth_folder(root: Path, split: str) -> DepthSet:
    """Return the pairs of any folder, depth as 16-bit PNG in millimetres; see `find_pairs`.

    Raises:
        DatasetError: see `find_pairs`.
    """
    return DepthSet(find_pairs(root, split, NAMES))


_NYU_HELP = (
    "NYUv2 must lie as nyu_train.txt and nyu_test.txt with lines `rgb depth focal` below the folder, or as "
    "sync/SCENE/rgb_*.jpg with sync_depth_*.png and official_splits/test/SCENE/; get it with the scripts of "
    "https://github.com/cleinc/bts (pytorch version) or https://github.com/zhyever/Monocular-Depth-Estimation-Toolbox"
)
_NYU_LISTS = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "val": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
_NYU_FOLDERS = {"train": ("", "sync"), "val": ("", "official_splits/test", "test")}


def nyu_v2(root: Path, split: str) -> DepthSet:
    """Return NYUv2, Eigen's split: 24,231 images to train on and 654 to be tested on, depth to 10 m, Eigen's crop.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    lists = [root / name for name in _NYU_LISTS[split] if (root / name).is_file()]
    if lists:
        pairs = list(_listed(root, lists[0], _NYU_FOLDERS[split], _NYU_FOLDERS[split], _NYU_HELP))
    else:
        folders = [root / name for name in _NYU_FOLDERS[split][1:] if (root / name).is_dir()]
        if not folders:
            raise DatasetError(f"looked for {', '.join(_NYU_LISTS[split])} and folders in {root}. {_NYU_HELP}")
        colours = [path for path in image_files(folders[0]) if path.name.startswith("rgb_")]
        pairs = [Pair(path, path.with_name(f"sync_depth_{path.stem[4:]}.png")) for path in colours]
    if not pairs:
        raise DatasetError(f"no images of NYUv2 in {root}. {_NYU_HELP}")
    window = _nyu_border if split == TRAIN else None
    return DepthSet(check_exist(pairs, "NYUv2"), max_depth=10.0, crop=eigen_crop_nyu, window=window)


_KITTI_HELP = (
    "KITTI must lie as input/DATE/DRIVE/image_02/data/*.png (raw data) and gt_depth/DRIVE/proj_depth/groundtruth/"
    "image_02/*.png (annotated depth), with kitti_eigen_train.txt and kitti_eigen_test.txt of lines `image depth "
    "focal`; get it at https://www.cvlibs.net/datasets/kitti and the lists at "
    "https://github.com/zhyever/Monocular-Depth-Estimation-Toolbox"
)
_KITTI_LISTS = {
    "train": ("kitti_eigen_train.txt", "eigen_train_files_with_gt.txt"),
    "val": ("kitti_eigen_test.txt", "eigen_test_files_with_gt.txt"),
}


def kitti(root: Path, split: str) -> DepthSet:
    """Return KITTI, Eigen's split: depth to 80 m, the benchmark's window of 352 x 1216 pixels, Garg's crop in it.

    Images whose ground truth the list gives as `None` are left out.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    lists = [root / name for name in _KITTI_LISTS[split] if (root / name).is_file()]
    if not lists:
        raise DatasetError(f"looked for {' or '.join(_KITTI_LISTS[split])} in {root}. {_KITTI_HELP}")
    images, depths = ("input", "", "raw"), ("gt_depth", "", "depth", "data_depth_annotated")
    pairs = check_exist(_listed(root, lists[0], images, depths, _KITTI_HELP), "KITTI")
    if not pairs:
        raise DatasetError(f"no image of {lists[0]} has ground truth. {_KITTI_HELP}")
    return DepthSet(pairs, units_per_metre=256.0, max_depth=80.0, crop=garg_crop, window=kitti_window)


def _listed(
    root: Path, path: Path, image_folders: tuple[str, ...], depth_folders: tuple[str, ...], help_text: str
) -> Iterator[Pair]:
    """Yield the pairs of a list of `image depth [focal]` lines, below the first of the folders that holds them."""
    for number, line in enumerate(read_lines(path, help_text), start=1):
        words = line.split()
        if len(words) < 2:
            raise DatasetError(f"expected `image depth [focal]` in line {number} of {path}, got {line!r}")
        if words[1] != "None":
            yield Pair(_below(root, image_folders, words[0]), _below(root, depth_folders, words[1]))


def _below(root: Path, folders: tuple[str, ...], name: str) -> Path:
    paths = [root / folder / name.lstrip("/") for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


LAYOUTS: dict[str, Callable[[Path, str], DepthSet]] = {"folder": depth_folder, "nyu": nyu_v2, "kitti": kitti}


def make_depth_set(
    layout: str,
    root: Path,
    split: str,
    *,
    units_per_metre: float = 0.0,
    max_depth: float = 0.0,
    crop: str = "",
) -> DepthSet:
    """Return a split of a data set of depth.

    Args:
        layout: a key of `LAYOUTS`.
        root: its folder.
        split: `train` or `val`.
        units_per_metre: instead of the layout's; 0: the layout's.
        max_depth: metres, likewise.
        crop: a key of `CROPS`, likewise; empty: the layout's.

    Raises:
        DatasetError: an unknown name, or the data set's own fault.
    """
    if layout not in LAYOUTS or (crop and crop not in CROPS):
        raise DatasetError(f"expected a layout of {', '.join(LAYOUTS)} and a crop of {', '.join(CROPS)}")
    found = LAYOUTS[layout](root.expanduser(), split)
    if units_per_metre:
        found = replace(found, units_per_metre=units_per_metre)
    if max_depth:
        found = replace(found, max_depth=max_depth)
    return replace(found, crop=CROPS[crop]) if crop else found
