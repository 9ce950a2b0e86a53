"""Average precision: cases done by hand, and the format of the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.coco import DetectionSet, read_coco
from dinov2_equi.evaluation.dense.detection_metrics import BOX, MASK, as_detections, average_precision


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


def test_mask_is_stored_by_rows() -> None:
    masks = torch.zeros(1, 1, 3, 4)
    masks[0, 0, 1, :] = 1
    box = torch.tensor([[0.0, 1.0, 4.0, 2.0]])
    output = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.5]), "masks": masks}
    (found,) = as_detections(output, 3, [8])
    assert found["bbox"] == [0, 1, 4, 1] and found["category_id"] == 8 and found["image_id"] == 3
    from pycocotools import mask as tools

    assert np.array_equal(tools.decode(found["segmentation"]), masks[0, 0].numpy())
