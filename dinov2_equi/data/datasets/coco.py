"""Images with boxes and masks of objects in COCO's JSON format."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb
from dinov2_equi.data.datasets.pairs import SPLITS

NAMES = {"train": ("train2017", "train", "train2014"), "val": ("val2017", "val", "validation", "val2014")}
_HELP = (
    "COCO's format must lie as annotations/instances_train2017.json with the images in train2017/, and the same for "
    "val2017 (also train and val, also images/train2017/); get COCO at https://cocodataset.org/#download. Files that "
    "lie elsewhere: --train JSON IMAGES --val JSON IMAGES"
)
_CORNERS_OF_AN_AREA = 6
"""Numbers of a polygon with three corners."""

Annotation = Mapping[str, Any]


class Objects(NamedTuple):
    """The objects of an image."""

    boxes: Tensor
    """float32 [n, 4]: left, top, right and bottom in pixels."""

    labels: Tensor
    """int64 [n], 1 to the number of classes; 0 is the background of torchvision's detectors."""

    masks: Tensor | None
    """uint8 [n, H, W], 1 inside; None where they were not asked for."""


@dataclass(frozen=True)
class DetectionSet:
    """Images with objects, in the order of their ids.

    Attributes:
        path: the JSON file.
        folder: of the images.
        images: entries of the file.
        annotations: entries of the file by id of the image.
        category_ids: ids of the classes; class number k, counted from 1, is `category_ids[k - 1]`.
        classes: their names.
    """

    path: Path
    folder: Path
    images: list[Mapping[str, Any]]
    annotations: Mapping[int, list[Annotation]]
    category_ids: list[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.images[index]["file_name"])

    @property
    def has_masks(self) -> bool:
        """Whether every object has an outline."""
        return all(a.get("segmentation") for found in self.annotations.values() for a in found)

    def load_image(self, index: int) -> Tensor:
        """Return an image, uint8 [3, H, W].

        Raises:
            DatasetError: it cannot be read, or has another size than the JSON file says; names it.
        """
        entry = self.images[index]
        image = image_to_tensor(read_rgb(Path(self.name(index))))
        if tuple(image.shape[-2:]) != (entry["height"], entry["width"]):
            raise DatasetError(
                f"{self.name(index)} is {image.shape[2]} x {image.shape[1]} pixels, but {self.path} says "
                f"{entry['width']} x {entry['height']}"
            )
        return image

    def objects(self, index: int, *, with_masks: bool) -> Objects:
        """Return the objects that are trained on: no crowds, no boxes without area inside the image, no empty masks.

        Raises:
            DatasetError: masks are asked for and an object has no outline, or none that can be read.
            ImportError: masks are asked for without pycocotools.
        """
        entry = self.images[index]
        boxes, labels, masks = [], [], []
        numbers = {category: number for number, category in enumerate(self.category_ids, start=1)}
        for annotation in self.annotations.get(entry["id"], ()):
            box = clipped_box(annotation["bbox"], entry["width"], entry["height"])
            if annotation.get("iscrowd") or box is None:
                continue
            mask = mask_tools().decode(self.run_lengths(annotation, entry)) if with_masks else None
            if mask is not None and not mask.any():
                continue
            boxes.append(box)
            labels.append(numbers[annotation["category_id"]])
            if mask is not None:
                masks.append(mask)
        size = (entry["height"], entry["width"])
        stacked = np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
        return Objects(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(stacked) if with_masks else None,
        )

    def run_lengths(self, annotation: Annotation, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mask of an object in an image as pycocotools' run lengths.

        A polygon of fewer than three corners encloses nothing. pycocotools would take its four numbers for a box.

        Raises:
            DatasetError: there is no outline, it is neither polygons nor run lengths, or it is of another size than
                the image; names file and object.
        """
        outline, size = annotation.get("segmentation"), [entry["height"], entry["width"]]
        where = f"object {annotation.get('id')} of {self.path}"
        if not outline:
            raise DatasetError(f"{where} has no segmentation; choose a detector without masks")
        if isinstance(outline, list):
            if not all(isinstance(p, list) and len(p) % 2 == 0 and _are_numbers(p) for p in outline):
                raise DatasetError(
                    f"expected polygons [[x1, y1, x2, y2, ...], ...] in {where}, got {str(outline)[:60]}"
                )
            polygons = [polygon for polygon in outline if len(polygon) >= _CORNERS_OF_AN_AREA]
            return _from_polygons(polygons, size)
        if not isinstance(outline, dict) or "counts" not in outline or list(outline.get("size", ())) != size:
            found = outline.get("size") if isinstance(outline, dict) else outline
            raise DatasetError(
                f"expected the mask of {where} to be of the size {size} of its image, got {str(found)[:60]}"
            )
        counts = outline["counts"]
        if not isinstance(counts, list):
            return {"size": size, "counts": counts}
        if not _are_numbers(counts) or min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
            raise DatasetError(f"expected run lengths of {size[0] * size[1]} pixels in {where}, got {str(counts)[:60]}")
        code: dict[str, Any] = mask_tools().frPyObjects(outline, *size)
        return code


def _are_numbers(values: list[Any]) -> bool:
    """Return whether all are finite numbers."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _from_polygons(polygons: list[list[float]], size: list[int]) -> dict[str, Any]:
    """Return the run lengths of the area that some polygons enclose; of no polygon an empty one."""
    tools = mask_tools()
    empty = {"size": size, "counts": [size[0] * size[1]]}
    codes = tools.frPyObjects(polygons, *size) if polygons else [tools.frPyObjects(empty, *size)]
    code: dict[str, Any] = tools.merge(codes)
    return code


def clipped_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
    """Return a box (left, top, width, height) as (left, top, right, bottom) inside the image; None without area."""
    left, top = max(float(box[0]), 0.0), max(float(box[1]), 0.0)
    right, bottom = min(float(box[0] + box[2]), float(width)), min(float(box[1] + box[3]), float(height))
    return (left, top, right, bottom) if right > left and bottom > top else None


def mask_tools() -> Any:
    """Return pycocotools' functions for masks.

    Raises:
        ImportError: says what to install.
    """
    return import_coco("mask")


def import_coco(name: str) -> Any:
    """Return a module of pycocotools.

    Raises:
        ImportError: says what to install.
    """
    try:
        return importlib.import_module(f"pycocotools.{name}")
    except ImportError as error:
        raise ImportError(
            f"detection needs pycocotools: pip install -r eval/detection/requirements.txt ({error})"
        ) from error


def coco_files(root: Path, split: str) -> tuple[Path, Path]:
    """Return the JSON file and the folder of images of a split of COCO's layout.

    Raises:
        DatasetError: they do not lie there; says how they must lie and where to get them.
    """
    if split not in SPLITS:
        raise DatasetError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
    for name in NAMES[split]:
        path = root / "annotations" / f"instances_{name}.json"
        for folder in (root / name, root / "images" / name):
            if path.is_file() and folder.is_dir():
                return path, folder
    raise DatasetError(f"no {split} images with annotations in {root}. {_HELP}")


def read_coco(path: Path, folder: Path) -> DetectionSet:
    """Return the images and objects of a JSON file.

    Raises:
        DatasetError: the file is no such JSON, an entry lacks a key or names an unknown image or class, an image file
            is missing; names it.
    """
    document = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DatasetError(f"{path} lacks the list {key!r}: no file in COCO's format")
    for kind, needed in (
        ("images", ("id", "file_name", "width", "height")),
        ("annotations", ("image_id", "category_id", "bbox")),
        ("categories", ("id", "name")),
    ):
        _check_keys(document[kind], kind, needed, path)
    images = sorted(document["images"], key=lambda entry: int(entry["id"]))
    categories = sorted(document["categories"], key=lambda entry: int(entry["id"]))
    if not images or not categories:
        raise DatasetError(f"{path} has no images or no categories")
    _check_references(document, path)
    missing = [str(folder / i["file_name"]) for i in images if not (folder / i["file_name"]).is_file()]
    if missing:
        raise DatasetError(f"{len(missing)} of {len(images)} images of {path} are missing, the first is {missing[0]}")
    annotations: dict[int, list[Annotation]] = {}
    for annotation in document["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    ids, names = [c["id"] for c in categories], tuple(str(c["name"]) for c in categories)
    return DetectionSet(path, folder, images, annotations, ids, names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise DatasetError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{path} holds a {type(document).__name__}: no file in COCO's format")
    return document


def _check_keys(entries: list[Any], kind: str, needed: tuple[str, ...], path: Path) -> None:
    """Refuse entries that lack a key, or whose sizes, ids or boxes are no numbers."""
    for number, entry in enumerate(entries):
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise DatasetError(f"{kind}[{number}] in {path} lacks {', '.join(lacking)}")
        for key in ("id", "image_id", "category_id", "width", "height"):
            if key in needed and not (_are_numbers([entry[key]]) and float(entry[key]).is_integer()):
                raise DatasetError(f"{kind}[{number}] in {path} has the {key} {entry[key]!r}: expected a whole number")
        if kind == "images" and min(entry["width"], entry["height"]) < 1:
            raise DatasetError(f"images[{number}] in {path} is {entry['width']} x {entry['height']} pixels large")
        if kind == "annotations":
            box = entry["bbox"]
            if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
                raise DatasetError(f"annotations[{number}] in {path} has the bbox {box}: expected four numbers")


def _check_references(document: Mapping[str, Any], path: Path) -> None:
    """Refuse ids that occur twice, and annotations of images and classes that do not exist."""
    for kind in ("images", "categories"):
        counts = Counter(entry["id"] for entry in document[kind])
        double = next((key for key, count in counts.items() if count > 1), None)
        if double is not None:
            raise DatasetError(f"{path} has several {kind} with the id {double}")
        key = "image_id" if kind == "images" else "category_id"
        unknown = next((a for a in document["annotations"] if a[key] not in counts), None)
        if unknown is not None:
            raise DatasetError(f"annotation {unknown.get('id')} in {path} has the unknown {key} {unknown[key]}")
