"""Average precision of detections, by pycocotools or faster-coco-eval."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.coco import DetectionSet, clipped_box, import_coco, mask_tools

logger = logging.getLogger(__name__)

BOX, MASK = "bbox", "segm"
AUTO, PYCOCOTOOLS, FASTER = "auto", "pycocotools", "faster-coco-eval"
COCO_LIBRARIES = (PYCOCOTOOLS, FASTER)
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


def coco_library(name: str = AUTO) -> str:
    """Return the library that measures: `pycocotools`, `faster-coco-eval`, or for `auto` the second where it is there.

    Raises:
        ValueError: for an unknown name.
        ImportError: it is not installed; says what to install.
    """
    if name not in (AUTO, *COCO_LIBRARIES):
        raise ValueError(f"expected one of {', '.join((AUTO, *COCO_LIBRARIES))}, got {name!r}")
    chosen = name
    if name != PYCOCOTOOLS:
        try:
            importlib.import_module("faster_coco_eval").COCOeval_faster  # noqa: B018 (some versions lack it)
            chosen = FASTER
        except (ImportError, AttributeError, OSError) as error:
            if name == FASTER:
                raise ImportError(
                    f"faster-coco-eval cannot be used ({error}): pip install -r eval/detection/requirements.txt"
                ) from error
            chosen = PYCOCOTOOLS
    import_coco("mask" if chosen == FASTER else "cocoeval")
    return chosen


def average_precision(
    dataset: DetectionSet, detections: Sequence[Detection], kind: str, library: str = AUTO
) -> dict[str, Any]:
    """Return COCO's twelve numbers and the AP of each class, in [0, 1]; NaN where nothing of a kind is to be found.

    Crowds count as COCO counts them: what is found in them is neither right nor wrong. A true object whose box has no
    area inside the image cannot be found, and is left out; of masks also one without a pixel.

    Args:
        dataset: what is true.
        detections: of its images.
        kind: `bbox` or `segm`.
        library: see `coco_library`; both give the same numbers.

    Raises:
        ImportError: the library is not installed.
        DatasetError: `segm`, and an object without a mask that can be read.
    """
    library = coco_library(library)
    truth = _truth(dataset, kind)
    if not detections:
        return _nothing_found(truth, dataset)
    with contextlib.redirect_stdout(io.StringIO()):  # they print what they return
        measured = _measured(truth, copy.deepcopy(list(detections)), kind, library)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    numbers = dict(zip(_STATS, (_known(value) for value in measured.stats[: len(_STATS)]), strict=True))
    precision = measured.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]: all areas, 100 detections
    by_class = {
        name: float(values[values > -1].mean()) if (values > -1).any() else math.nan
        for name, values in zip(dataset.classes, np.moveaxis(precision, 2, 0), strict=True)
    }
    return {**numbers, "by_class": by_class}


def perfect_detections(dataset: DetectionSet, kind: str) -> list[Detection]:
    """Return what is true as if it had been found with the score 1: its average precision is 1.

    Args:
        dataset: what is true.
        kind: `bbox`, or `segm` where every object has an outline.
    """
    found: list[Detection] = []
    for index, entry in enumerate(dataset.images):
        objects = dataset.objects(index, with_masks=kind == MASK)
        output = {"boxes": objects.boxes, "labels": objects.labels, "scores": torch.ones(len(objects.labels))}
        if objects.masks is not None:
            output["masks"] = objects.masks[:, None].float()
        found += as_detections(output, int(entry["id"]), dataset.category_ids)
    return found


def _measured(truth: dict[str, Any], detections: list[Detection], kind: str, library: str) -> Any:
    """Return the object of a library that measures detections."""
    if library == FASTER:
        faster = importlib.import_module("faster_coco_eval")
        known = faster.COCO(truth)
        return faster.COCOeval_faster(known, known.loadRes(detections), kind, print_function=logger.debug)
    known = import_coco("coco").COCO()
    known.dataset = truth
    known.createIndex()
    return import_coco("cocoeval").COCOeval(known, known.loadRes(detections), kind)


def _truth(dataset: DetectionSet, kind: str) -> dict[str, Any]:
    """Return the data set as both libraries want it, with what some files leave out."""
    annotations: list[dict[str, Any]] = []
    entries = {entry["id"]: entry for entry in dataset.images}
    for annotation in (a for found in dataset.annotations.values() for a in found):
        entry = entries[annotation["image_id"]]
        if clipped_box(annotation["bbox"], entry["width"], entry["height"]) is None:
            continue
        area = annotation.get("area")
        if area is None:
            area = annotation["bbox"][2] * annotation["bbox"][3]
        filled = {**annotation, "iscrowd": int(annotation.get("iscrowd") or 0), "area": area}
        if kind == MASK:
            filled["segmentation"] = dataset.run_lengths(annotation, entry)
            if not mask_tools().area(filled["segmentation"]):
                continue
        annotations.append(filled | {"id": len(annotations) + 1})  # from 1: pycocotools takes 0 for "no match"
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
