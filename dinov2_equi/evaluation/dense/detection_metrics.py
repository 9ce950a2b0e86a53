"""Average precision of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dinov2_equi.data.datasets.coco import DetectionSet, clipped_box, import_coco, mask_tools

BOX, MASK = "bbox", "segm"
_STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
MASK_THRESHOLD = 0.5

Detection = dict[str, Any]
"""An entry of COCO's result format."""


def as_detections(output: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Detection]:
    """Return what torchvision's detectors found in an image in COCO's result format.

    Args:
        output: boxes [n, 4] (left, top, right, bottom), labels [n] from 1, scores [n]; masks [n, 1, H, W] where there
            are any.
        image_id: of the image.
        category_ids: of the classes.
    """
    boxes, masks = output["boxes"].double().cpu(), output.get("masks")
    assert not len(boxes) or int(output["labels"].min()) >= 1
    sides = boxes[:, 2:] - boxes[:, :2]
    found: list[Detection] = []
    for number, (label, score) in enumerate(zip(output["labels"].tolist(), output["scores"].tolist(), strict=True)):
        box = [*boxes[number, :2].tolist(), *sides[number].tolist()]
        found.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
        if masks is not None:
            inside = (masks[number, 0] >= MASK_THRESHOLD).cpu().numpy()
            code = mask_tools().encode(np.asfortranarray(inside, dtype=np.uint8))
            found[-1]["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return found


def average_precision(dataset: DetectionSet, detections: Sequence[Detection], kind: str) -> dict[str, Any]:
    """Return COCO's twelve numbers and the AP of each class, in [0, 1]; NaN where nothing of a kind is to be found.

    Crowds count as COCO counts them: what is found in them is neither right nor wrong. A true object whose box has no
    area inside the image cannot be found, and is left out.

    Args:
        dataset: what is true.
        detections: of its images.
        kind: `bbox` or `segm`.

    Raises:
        ImportError: without pycocotools.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it returns
        truth = import_coco("coco").COCO()
        truth.dataset = _truth(dataset)
        truth.createIndex()
        if not detections:
            return _nothing_found(truth.dataset, dataset)
        measured = import_coco("cocoeval").COCOeval(truth, truth.loadRes(copy.deepcopy(list(detections))), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    numbers = dict(zip(_STATS, (_known(value) for value in measured.stats), strict=True))
    precision = measured.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]: all areas, 100 detections
    by_class = {
        name: float(values[values > -1].mean()) if (values > -1).any() else math.nan
        for name, values in zip(dataset.classes, np.moveaxis(precision, 2, 0), strict=True)
    }
    return {**numbers, "by_class": by_class}


def _truth(dataset: DetectionSet) -> dict[str, Any]:
    """Return the data set as pycocotools wants it, with what some files leave out."""
    annotations: list[dict[str, Any]] = []
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in dataset.images}
    for found in dataset.annotations.values():
        for annotation in found:
            if clipped_box(annotation["bbox"], *sizes[annotation["image_id"]]) is None:
                continue
            area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
            filled = {**annotation, "iscrowd": int(annotation.get("iscrowd", 0)), "area": area}
            annotations.append(filled | {"id": len(annotations) + 1})  # from 1: it takes 0 for "no match"
    categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.classes, strict=True)]
    return {"info": {}, "images": list(dataset.images), "annotations": annotations, "categories": categories}


def _nothing_found(truth: Mapping[str, Any], dataset: DetectionSet) -> dict[str, Any]:
    """Return the numbers of no detection at all, of which pycocotools makes an error."""
    real = [a for a in truth["annotations"] if not a["iscrowd"]]
    there = {a["category_id"] for a in real}
    by_class = {
        name: 0.0 if category in there else math.nan
        for name, category in zip(dataset.classes, dataset.category_ids, strict=True)
    }
    return {**dict.fromkeys(_STATS, 0.0 if real else math.nan), "by_class": by_class}


def _known(value: float) -> float:
    """Return a number of COCO, whose -1 stands for nothing to be found."""
    return math.nan if value == -1 else float(value)
