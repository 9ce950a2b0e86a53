"""COCO's JSON format: crowds, boxes without area, masks, and files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.coco import clipped_box, coco_files, read_coco

CATEGORIES = [{"id": 7, "name": "cell"}, {"id": 3, "name": "dot"}]


def annotation(number: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 5, "category_id": category, "bbox": box, "iscrowd": 0, **more}


def write(root: Path, objects: list[dict[str, Any]], **changes: Any) -> Path:
    folder = root / "train"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "a.png")  # grey
    image = {"id": 5, "file_name": "a.png", "width": 30, "height": 20}
    document = {"images": [image], "annotations": objects, "categories": CATEGORIES} | changes
    path = root / "annotations" / "instances_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_objects_of_an_image(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            annotation(1, 7, [2, 3, 10, 5]),
            annotation(2, 3, [25, 15, 20, 20]),  # beyond the border
            annotation(3, 3, [5, 5, 0, 4]),
            annotation(4, 3, [30, 5, 4, 4]),  # outside
            annotation(5, 7, [0, 0, 30, 20], iscrowd=1),
        ],
    )
    dataset = read_coco(path, tmp_path / "train")
    assert dataset.classes == ("dot", "cell") and dataset.category_ids == [3, 7]
    assert dataset.load_image(0).shape == (3, 20, 30)
    found = dataset.objects(0, with_masks=False)
    assert found.boxes.tolist() == [[2, 3, 12, 8], [25, 15, 30, 20]] and found.labels.tolist() == [2, 1]
    assert found.masks is None and not dataset.has_masks


def test_mask_of_an_object_is_another_one(tmp_path: Path) -> None:
    square = [[2, 3, 12, 3, 12, 8, 2, 8]]
    inside = np.zeros((20, 30), np.uint8)
    inside[3:8, 2:12] = 1
    flat = inside.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()  # lengths of runs, column by column, zeros first
    path = write(
        tmp_path,
        [
            annotation(1, 7, [2, 3, 10, 5], segmentation=square),
            annotation(2, 3, [2, 3, 10, 5], segmentation={"size": [20, 30], "counts": counts}),
        ],
    )
    dataset = read_coco(path, tmp_path / "train")
    masks = dataset.objects(0, with_masks=True).masks
    assert masks is not None and masks.dtype == torch.uint8 and dataset.has_masks
    assert all(np.array_equal(mask, inside) for mask in masks.numpy())


def run_lengths(size: list[int], counts: list[int] | str) -> dict[str, Any]:
    return {"size": size, "counts": counts}


@pytest.mark.parametrize(
    "outline",
    [
        [[5, 5, 9, 5]],  # two corners; pycocotools takes these numbers for a box
        [[5, 5, 5, 5, 5, 5]],
        run_lengths([20, 30], [600]),
        [[40, 5, 50, 5, 50, 9]],  # outside the image
    ],
)
def test_mask_without_a_pixel_is_trained_on(tmp_path: Path, outline: Any) -> None:
    square = [[2, 3, 12, 3, 12, 8, 2, 8]]
    objects = [
        annotation(1, 7, [5, 5, 4, 4], segmentation=outline),
        annotation(2, 3, [2, 3, 10, 5], segmentation=square),
    ]
    dataset = read_coco(write(tmp_path, objects), tmp_path / "train")
    found = dataset.objects(0, with_masks=True)
    assert found.labels.tolist() == [1] and found.masks is not None and found.masks.sum() == 50
    assert dataset.objects(0, with_masks=False).labels.tolist() == [2, 1]  # its box is there all the same


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        (run_lengths([30, 20], [600]), r"object 1 of .*json to be of the size \[20, 30\] of its image, got \[30, 20\]"),
        (run_lengths([20, 30], [500]), r"expected run lengths of 600 pixels in object 1 of .*json, got \[500\]"),
        (run_lengths([20, 30], [700, -100]), "expected run lengths of 600 pixels"),
        ([[1, 2, 3, 4, 5]], r"expected polygons .* in object 1 of .*json, got \[\[1, 2, 3, 4, 5\]\]"),
        ([[1, 2, 3, 4, 5, float("inf")]], "expected polygons"),
        ([1, 2, 3, 4, 5, 6], "expected polygons"),
        ("polygon", "of its image, got polygon"),
    ],
)
def test_mask_that_does_not_fit_is_taken(tmp_path: Path, outline: Any, message: str) -> None:
    dataset = read_coco(write(tmp_path, [annotation(1, 7, [5, 5, 4, 4], segmentation=outline)]), tmp_path / "train")
    with pytest.raises(DatasetError, match=message):
        dataset.objects(0, with_masks=True)


def test_crowd_is_trained_on(tmp_path: Path) -> None:
    counts = run_lengths([20, 30], [0, 600])
    objects = [annotation(1, 7, [0, 0, 30, 20], iscrowd=1, segmentation=counts)]
    found = read_coco(write(tmp_path, objects), tmp_path / "train").objects(0, with_masks=True)
    assert len(found.boxes) == 0 and found.masks is not None and found.masks.shape == (0, 20, 30)


@pytest.mark.parametrize(("mode", "top"), [("L", 255), ("I;16", 65535), ("1", 1)])
def test_grey_image_has_one_channel(tmp_path: Path, mode: str, top: int) -> None:
    path = write(tmp_path, [])
    picture = Image.new(mode, (30, 20), 0)
    picture.putpixel((3, 2), top)
    picture.save(tmp_path / "train" / "a.png")
    image = read_coco(path, tmp_path / "train").load_image(0)
    assert image.shape == (3, 20, 30) and image[:, 2, 3].tolist() == [255] * 3 and int(image.sum()) == 3 * 255


def test_image_without_objects_has_no_shapes(tmp_path: Path) -> None:
    found = read_coco(write(tmp_path, []), tmp_path / "train").objects(0, with_masks=True)
    assert found.boxes.shape == (0, 4) and found.labels.shape == (0,)
    assert found.masks is not None and found.masks.shape == (0, 20, 30)


def test_mask_that_is_missing_is_made_up(tmp_path: Path) -> None:
    dataset = read_coco(write(tmp_path, [annotation(1, 7, [2, 3, 10, 5])]), tmp_path / "train")
    with pytest.raises(DatasetError, match=r"object 1 of .*instances_train\.json has no segmentation"):
        dataset.objects(0, with_masks=True)


def test_image_of_another_size_is_taken(tmp_path: Path) -> None:
    image = {"id": 5, "file_name": "a.png", "width": 31, "height": 20}
    dataset = read_coco(write(tmp_path, [], images=[image]), tmp_path / "train")
    with pytest.raises(DatasetError, match=r"a\.png is 30 x 20 pixels, but .* says 31 x 20"):
        dataset.load_image(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "lacks the list 'images'"),
        ({"images": []}, "no images or no categories"),
        ({"images": [{"id": 5, "file_name": "a.png"}]}, r"images\[0\] in .* lacks width, height"),
        (
            {"images": [{"id": 5, "file_name": "b.png", "width": 3, "height": 2}]},
            r"1 of 1 images of .* first is .*b\.png",
        ),
        ({"annotations": [{"image_id": 5, "category_id": 7}]}, "lacks bbox"),
        ({"annotations": [annotation(1, 7, [1, 2, 3])]}, r"annotations\[0\] in .* the bbox \[1, 2, 3\]"),
        ({"annotations": [annotation(1, 7, [1, 2, 3, "4"])]}, "expected four numbers"),
        ({"annotations": [annotation(1, 7, [1, 2, 3, float("nan")])]}, "expected four numbers"),
        ({"annotations": [annotation(1, 7, None)]}, "the bbox None: expected four numbers"),
        ({"annotations": [annotation(1, "7", [1, 2, 3, 4])]}, "the category_id '7': expected a whole number"),
        ({"images": [{"id": 5, "file_name": "a.png", "width": 30, "height": 0}]}, "is 30 x 0 pixels large"),
        ({"annotations": [annotation(9, 8, [1, 2, 3, 4])]}, "annotation 9 in .* has the unknown category_id 8"),
        ({"annotations": [annotation(9, 7, [1, 2, 3, 4]) | {"image_id": 1}]}, "has the unknown image_id 1"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "several categories with the id 3"),
    ],
)
def test_file_that_is_wrong_is_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [], **changes)
    with pytest.raises(DatasetError, match=message):
        read_coco(path, tmp_path / "train")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_file_that_is_no_coco_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"a\.json"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "val"])
def test_layout_of_coco_is_not_found(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / "annotations" / f"instances_{Path(folder).name}.json"
    path.parent.mkdir()
    path.touch()
    assert coco_files(tmp_path, "val") == (path, tmp_path / folder)
    with pytest.raises(DatasetError, match="no train images .* get COCO at https"):
        coco_files(tmp_path, "train")


def test_boxes_are_cut_at_the_border() -> None:
    assert clipped_box([-2, -3, 5, 9], 10, 20) == (0, 0, 3, 6)
    assert clipped_box([8, 1, 9, 2], 10, 20) == (8, 1, 10, 3)
    assert clipped_box([10, 1, 9, 2], 10, 20) is None and clipped_box([1, 1, 0, 2], 10, 20) is None
