"""Average precision: cases done by hand, and the format of the results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.coco import DetectionSet, read_coco
from dinov2_equi.evaluation.dense.detection_metrics import (
    BOX,
    COCO_LIBRARIES,
    FASTER,
    MASK,
    PYCOCOTOOLS,
    as_detections,
    average_precision,
    coco_library,
    perfect_detections,
)


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionSet:
    """Return two images; three objects of class 4, one of class 9, none of class 11, a crowd, a box without area."""
    boxes = [(1, 4, [10, 10, 20, 30]), (1, 4, [50, 20, 40, 40]), (2, 4, [5, 5, 30, 30]), (2, 9, [40, 40, 20, 20])]
    annotations: list[dict[str, Any]] = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "segmentation": polygon(b), "area": b[2] * b[3]}
        for n, (i, c, b) in enumerate(boxes)  # an id of 0 is no match to pycocotools, unless it is renumbered
    ]
    crowd = {"size": [80, 100], "counts": [0, 80 * 10, 80 * 90]}
    annotations.append(
        {"id": 9, "image_id": 1, "category_id": 9, "bbox": [0, 0, 10, 80], "segmentation": crowd, "iscrowd": 1}
    )
    annotations.append(
        {"id": 10, "image_id": 1, "category_id": 4, "bbox": [3, 3, 0, 9], "segmentation": polygon([3, 3, 0, 9])}
    )
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (2, 1)]
    categories = [{"id": i, "name": f"c{i}"} for i in (4, 9, 11)]
    for i in (1, 2):
        Image.new("RGB", (100, 80)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return read_coco(tmp_path / "a.json", tmp_path)


def perfect(dataset: DetectionSet) -> list[dict[str, torch.Tensor]]:
    found = []
    for index in range(len(dataset)):
        objects = dataset.objects(index, with_masks=True)
        assert objects.masks is not None
        scores = torch.ones(len(objects.labels))
        masks = objects.masks[:, None].float()
        found.append({"boxes": objects.boxes, "labels": objects.labels, "scores": scores, "masks": masks})
    return found


def results(dataset: DetectionSet, outputs: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    pairs = zip(outputs, dataset.images, strict=True)
    return [d for output, entry in pairs for d in as_detections(output, entry["id"], dataset.category_ids)]


@pytest.mark.parametrize("kind", [BOX, MASK])
def test_perfect_detections_have_an_error(dataset: DetectionSet, kind: str) -> None:
    detections = results(dataset, perfect(dataset))
    json.dumps(detections)
    found = average_precision(dataset, detections, kind)
    assert found["AP"] == found["AP50"] == found["AR_100"] == pytest.approx(1.0, abs=1e-12)
    assert found["by_class"]["c4"] == pytest.approx(1.0, abs=1e-12) and math.isnan(found["by_class"]["c11"])
    assert math.isnan(found["AP_large"])  # no object has more than 96 x 96 pixels


def test_average_precision_of_a_case_done_by_hand(dataset: DetectionSet) -> None:
    """Of class 4 the first detection is wrong and the next two right, of three objects: precision 2/3 up to a recall of
    2/3, which are 67 of COCO's 101 points, and 0 beyond."""
    outputs = perfect(dataset)
    outputs[0]["boxes"][0] = torch.tensor([60.0, 60.0, 70.0, 70.0])
    outputs[0]["scores"] = torch.tensor([1.0, 0.5])
    assert outputs[0]["labels"].tolist() == [1, 1]
    outputs[1]["scores"] = outputs[1]["scores"] * 0.4
    kept = [d for d in results(dataset, outputs) if d["category_id"] == 4]
    found = average_precision(dataset, kept, BOX)
    assert found["by_class"]["c4"] == pytest.approx(67 / 101 * 2 / 3, abs=1e-9)
    assert found["by_class"]["c9"] == 0.0
    assert found["AP"] == pytest.approx((67 / 101 * 2 / 3 + 0) / 2, abs=1e-9)


def test_box_half_as_wide_counts_as_found(dataset: DetectionSet) -> None:
    """Boxes of 0.6 of the width overlap by 0.6: right at the thresholds 0.5, 0.55 and 0.6, wrong at the other seven."""
    outputs = perfect(dataset)
    for output in outputs:
        output["boxes"][:, 2] = output["boxes"][:, 0] + 0.601 * (output["boxes"][:, 2] - output["boxes"][:, 0])
    found = average_precision(dataset, results(dataset, outputs), BOX)
    assert found["AP50"] == pytest.approx(1.0) and found["AP75"] == 0.0
    assert found["AP"] == pytest.approx(0.3)


def test_detection_in_a_crowd_counts_as_wrong(dataset: DetectionSet) -> None:
    outputs = perfect(dataset)
    inside = {
        "boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([2.0]),  # ahead of all others
        "masks": torch.zeros(1, 1, 80, 100),
    }
    outputs[0] = {name: torch.cat([value, inside[name]]) for name, value in outputs[0].items()}
    assert average_precision(dataset, results(dataset, outputs), BOX)["AP"] == pytest.approx(1.0, abs=1e-12)


def test_no_detection_at_all_is_an_error(dataset: DetectionSet) -> None:
    found = average_precision(dataset, [], BOX)
    assert found["AP"] == 0.0 and found["by_class"]["c4"] == 0.0 and math.isnan(found["by_class"]["c11"])


def many_objects(root: Path) -> DetectionSet:
    """Return 12 images with up to 15 objects of 4 classes, a tenth of them crowds, of all of COCO's sizes."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(12):
        Image.new("RGB", (160, 120)).save(root / f"{number}.png")
        images.append({"id": 7 * number, "file_name": f"{number}.png", "width": 160, "height": 120})
        for _ in range(rng.integers(0, 16)):
            width, height = (int(v) for v in rng.integers(4, (150, 110)))
            box = [int(rng.integers(0, 160 - width)), int(rng.integers(0, 120 - height)), width, height]
            entry = {
                "id": len(annotations),
                "image_id": 7 * number,
                "category_id": int(rng.integers(1, 5)),
                "bbox": box,
            }
            entry |= {"iscrowd": int(rng.random() < 0.1), "area": width * height, "segmentation": polygon(box)}
            if entry["iscrowd"]:
                x, y, w, h = box
                inside = np.zeros((120, 160), np.uint8)
                inside[y : y + h, x : x + w] = 1
                flat = np.concatenate([[0], inside.flatten(order="F"), [2]])
                edges = np.flatnonzero(np.diff(flat)).tolist()  # begins with zeros, maybe none of them
                counts = np.diff([0, *edges]).tolist()
                entry["segmentation"] = {"size": [120, 160], "counts": counts}
            annotations.append(entry)
    categories = [{"id": i, "name": f"c{i}"} for i in range(1, 6)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "many.json").write_text(json.dumps(document))
    return read_coco(root / "many.json", root)


def blurred(dataset: DetectionSet) -> list[dict[str, Any]]:
    """Return what is true, moved about, some of it under another name, with scores of which many are equal."""
    rng = np.random.default_rng(1)
    outputs = perfect(dataset)
    for output in outputs:
        n = len(output["labels"])
        moves = torch.from_numpy(rng.normal(0, 5, (n, 4))).float()
        output["boxes"] = output["boxes"] + moves
        output["boxes"][:, 2:] = torch.maximum(output["boxes"][:, 2:], output["boxes"][:, :2] + 1)
        output["scores"] = torch.from_numpy(rng.random(n).round(1)).float()
        wrong = torch.from_numpy(rng.random(n) < 0.2)
        output["labels"] = torch.where(wrong, torch.from_numpy(rng.integers(1, 6, n)), output["labels"])
        output["masks"] = output["masks"].roll(3, dims=3)
    return results(dataset, outputs)


@pytest.mark.parametrize("kind", [BOX, MASK])
@pytest.mark.parametrize("library", COCO_LIBRARIES)
def test_perfect_detections_of_many_objects_have_an_error(tmp_path: Path, kind: str, library: str) -> None:
    if library == FASTER:
        pytest.importorskip("faster_coco_eval")
    dataset = many_objects(tmp_path)
    assert any(a["iscrowd"] for found in dataset.annotations.values() for a in found)
    found = average_precision(dataset, perfect_detections(dataset, kind), kind, library)
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100"):
        assert found[name] == pytest.approx(1.0, abs=1e-12)  # a mean of ones


@pytest.mark.parametrize("kind", [BOX, MASK])
def test_libraries_differ(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faster_coco_eval")
    dataset = many_objects(tmp_path)
    detections = blurred(dataset)
    own, other = (average_precision(dataset, detections, kind, library) for library in COCO_LIBRARIES)
    assert 0.05 < own["AP"] < 0.95
    for a, b in ((own, other), (own.pop("by_class"), other.pop("by_class"))):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(
            [a[k] for k in a if k != "by_class"], [b[k] for k in a if k != "by_class"], atol=1e-9
        )


def test_library_that_is_not_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_library() == coco_library(PYCOCOTOOLS) == PYCOCOTOOLS
    with pytest.raises(ImportError, match="pip install -r eval/detection/requirements.txt"):
        coco_library(FASTER)
    with pytest.raises(ValueError, match="auto, pycocotools, faster-coco-eval, got 'mine'"):
        coco_library("mine")


@pytest.mark.parametrize("library", COCO_LIBRARIES)
def test_mask_without_a_pixel_cannot_be_found(tmp_path: Path, library: str) -> None:
    """Rule: it counts for boxes, and is left out for masks. An area of null is that of the box."""
    if library == FASTER:
        pytest.importorskip("faster_coco_eval")
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    objects = [
        {"bbox": [10, 10, 20, 30], "segmentation": polygon([10, 10, 20, 30]), "area": None},
        {"bbox": [50, 20, 20, 20], "segmentation": [[50, 20, 70, 40]], "area": 0},
    ]
    annotations = [{"id": n, "image_id": 1, "category_id": 4, "iscrowd": None} | o for n, o in enumerate(objects)]
    image = {"id": 1, "file_name": "1.png", "width": 100, "height": 80}
    document = {"images": [image], "annotations": annotations, "categories": [{"id": 4, "name": "c"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    dataset = read_coco(tmp_path / "a.json", tmp_path)
    for kind, count in ((BOX, 2), (MASK, 1)):
        detections = perfect_detections(dataset, kind)
        assert len(detections) == count
        assert average_precision(dataset, detections, kind, library)["AP"] == pytest.approx(1.0, abs=1e-12)


def test_mask_is_stored_by_rows() -> None:
    masks = torch.zeros(1, 1, 3, 4)
    masks[0, 0, 1, :] = 1
    box = torch.tensor([[0.0, 1.0, 4.0, 2.0]])
    output = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.5]), "masks": masks}
    (found,) = as_detections(output, 3, [8])
    assert found["bbox"] == [0, 1, 4, 1] and found["category_id"] == 8 and found["image_id"] == 3
    from pycocotools import mask as tools

    assert np.array_equal(tools.decode(found["segmentation"]), masks[0, 0].numpy())
