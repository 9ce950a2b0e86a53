"""The simple feature pyramid and the detectors on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import MultiScaleRoIAlign

from dinov2_equi.data.datasets.coco import DetectionSet, read_coco
from dinov2_equi.evaluation.dense.detection import (
    DETECTORS,
    DetectionAugmentation,
    DetectionModel,
    DetectionSettings,
    as_list,
    evaluate_detection,
)
from dinov2_equi.evaluation.dense.feature_pyramid import SimpleFeaturePyramid
from dinov2_equi.evaluation.dense.training import trained_state
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels, random_backbone

SMALL = DetectionSettings(
    size=64, channels=8, anchor_size=8, steps=2, warmup_steps=1, batch_size=2, least_scale=0.8, detections=5
)


def make_model(patch_size: int = 16) -> EvalModel:
    if patch_size == 1:
        return EvalModel(name="pixels", backbone=RawPixels(), patch_size=1)
    backbone = random_backbone("vit_test_tiny", img_size=4 * patch_size, patch_size=patch_size)
    return EvalModel(name="tiny", backbone=backbone, patch_size=patch_size)


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionSet:
    """Return two images of 60 x 40 pixels, a bright square of 20 pixels in each, and one without anything."""
    images, annotations = [], []
    for number in range(3):
        pixels = np.zeros((40, 60, 3), np.uint8)
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 40})
        if number < 2:
            left = 10 + 20 * number
            pixels[10:30, left : left + 20] = 255
            outline = [[left, 10, left + 20, 10, left + 20, 30, left, 30]]
            entry: dict[str, Any] = {"id": number, "image_id": number, "category_id": 2, "bbox": [left, 10, 20, 20]}
            annotations.append(entry | {"segmentation": outline, "area": 400, "iscrowd": 0})
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    document = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "square"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    return read_coco(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize("patch_size", [8, 14, 16, 1])
def test_maps_of_the_pyramid_have_inexact_strides(patch_size: int) -> None:
    pyramid = SimpleFeaturePyramid(make_model(patch_size), (4, 8, 16, 32), 1, 8)
    assert pyramid.size_divisible == 64
    found = pyramid(torch.rand(2, 3, 64, 128))
    shapes = {name: tuple(level.shape) for name, level in found.items()}
    assert shapes == {str(k): (2, 8, 64 // s, 128 // s) for k, s in enumerate((4, 8, 16, 32, 64))}


def test_map_of_another_patch_size_is_shifted() -> None:
    """A bright spot must lie at the same place of the map, whatever the patches are."""
    places = []
    for patch_size in (8, 14, 16):
        model = make_model(patch_size)
        pyramid = SimpleFeaturePyramid(model, (16,), 0, 8)
        images = torch.zeros(1, 3, 128, 192)
        empty = pyramid._last_map(images)
        images[..., 96:112, 32:64] = 3.0
        change = (pyramid._last_map(images) - empty).square().sum(dim=1)[0]  # [h, w]
        h, w = change.shape
        weights = change / change.sum()
        rows, columns = (torch.arange(n) + 0.5 for n in (h, w))
        places.append((float((weights.sum(1) * rows).sum()) / h, float((weights.sum(0) * columns).sum()) / w))
    for y, x in places:
        # The spot's centre is at 0.8125 and 0.25; attention spreads a little of it over the whole image.
        assert y == pytest.approx(0.8125, abs=0.1) and x == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("size", [(64, 64), (130, 256), (40, 100)])
def test_region_pooling_infers_wrong_scales_from_padding(size: tuple[int, int]) -> None:
    model = DetectionModel(make_model(), dataclasses.replace(SMALL, detector="faster_rcnn"), 1)
    pooling = model.detector.roi_heads.box_roi_pool  # type: ignore[union-attr]
    assert isinstance(pooling, MultiScaleRoIAlign)
    padded = [-(-side // 64) * 64 for side in size]
    maps = {str(k): torch.zeros(1, 8, padded[0] // s, padded[1] // s) for k, s in enumerate((4, 8, 16, 32))}
    pooling(maps, [torch.tensor([[0.0, 0.0, 20.0, 20.0]])], [size])
    assert pooling.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("detector", DETECTORS)
def test_detector_has_no_loss_or_no_detections(detector: str, dataset: DetectionSet) -> None:
    settings = dataclasses.replace(SMALL, detector=detector, score_threshold=0.0)
    torch.manual_seed(0)
    model = DetectionModel(make_model(), settings, 1)
    augment = DetectionAugmentation(settings, dataset)
    terms = model.train().losses(as_list([augment(0), augment(2)]), "cpu")
    assert all("loss" in name and value.isfinite() for name, value in terms.items())
    assert ("loss_mask" in terms) == (detector == "mask_rcnn")
    torch.stack(list(terms.values())).sum().backward()
    levels = [p for name, p in model.pyramid.named_parameters() if not name.startswith("features.")]
    assert sum(parameter.grad is not None for parameter in levels) == len(levels)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    found = model.eval().predict(dataset.load_image(0))
    assert len(found["boxes"]) and set(found["labels"].tolist()) == {1}
    if detector == "mask_rcnn":
        assert found["masks"].shape[1:] == (1, 40, 60)


def test_untrained_retinanet_finds_background(dataset: DetectionSet) -> None:
    """It has no class for it. With one it finds label 0, which would count as the last class."""
    settings = dataclasses.replace(SMALL, detector="retinanet", score_threshold=0.0, detections=50)
    labels: set[int] = set()
    for seed in range(3):
        torch.manual_seed(seed)
        found = DetectionModel(make_model(), settings, 3).eval().predict(dataset.load_image(0))
        labels |= set(found["labels"].tolist())
    assert labels == {1, 2, 3}


def test_frozen_backbone_is_written_twice_or_at_all() -> None:
    model = DetectionModel(make_model(), SMALL, 1)
    names = set(trained_state(model, model.backbone))
    assert names and not any(".features.backbone." in name for name in names)
    whole = DetectionModel(make_model(), dataclasses.replace(SMALL, finetune=True), 1)
    values = list(trained_state(whole, whole.backbone).values())
    assert len({id(value) for value in values}) == len(values)
    assert any(isinstance(module, nn.LayerNorm) for module in whole.backbone.modules())


def test_boxes_and_masks_of_a_crop_belong_to_other_pixels(dataset: DetectionSet) -> None:
    augment = DetectionAugmentation(SMALL, dataset)
    seen = 0
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = augment(seed % 2)
        assert image.shape == (3, 64, 64) and target["masks"].shape == (len(target["boxes"]), 64, 64)
        bright = image[0] > 0.7
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            seen += 1
            rows, columns = bright.nonzero(as_tuple=True)
            edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() <= 1.5  # resizing blurs an edge over a pixel or so
            assert (mask.bool() == bright).float().mean() > 0.97
    assert seen >= 6


def test_precision_of_masks_is_measured_without_masks(dataset: DetectionSet) -> None:
    model = DetectionModel(make_model(), SMALL, 1)
    numbers = evaluate_detection(model, dataset, SMALL)
    assert set(numbers) == {"num_images", "num_detections", "box", "mask"}
    assert 0 <= numbers["box"]["AP"] <= 1 and numbers["num_images"] == 3
    settings = dataclasses.replace(SMALL, detector="faster_rcnn")
    assert "mask" not in evaluate_detection(DetectionModel(make_model(), settings, 1), dataset, settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"detector": "yolo"}, "mask_rcnn, faster_rcnn, retinanet"),
        ({"size": 0}, "size"),
        ({"least_scale": 3.0}, "scale"),
    ],
)
def test_wrong_recipe_is_taken(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **values).check()  # type: ignore[arg-type]
