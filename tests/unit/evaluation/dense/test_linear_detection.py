"""The linear detection probe: maps that are the tokens, and a head without a hidden layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from dinov2_equi.evaluation.dense.detection import DetectionModel, DetectionSettings
from dinov2_equi.evaluation.dense.feature_pyramid import ResampledMaps
from dinov2_equi.evaluation.dense.linear_detection import LinearHead
from dinov2_equi.evaluation.dense.training import trained_state
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels, random_backbone

SETTINGS = DetectionSettings(detector="linear", size=64, batch_size=2, steps=2, warmup_steps=1)


def make_model(patch_size: int = 16) -> EvalModel:
    if patch_size == 1:
        return EvalModel(name="pixels", backbone=RawPixels(), patch_size=1)
    backbone = random_backbone("vit_test_tiny", img_size=4 * patch_size, patch_size=patch_size)
    return EvalModel(name="tiny", backbone=backbone, patch_size=patch_size)


@pytest.mark.parametrize("patch_size", [8, 14, 16, 1])
def test_maps_of_the_probe_have_inexact_strides(patch_size: int) -> None:
    maps = ResampledMaps(make_model(patch_size), (8, 16, 32, 64))
    assert maps.size_divisible == 64
    found = maps(torch.rand(2, 3, 64, 128))
    shapes = [tuple(level.shape[-2:]) for level in found.values()]
    assert shapes == [(8, 16), (4, 8), (2, 4), (1, 2)]


def test_maps_of_the_probe_are_other_than_the_tokens() -> None:
    model = make_model()
    maps = ResampledMaps(model, (8, 16, 32)).eval()
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    tokens = model.backbone.forward_features(images)["x_norm_patchtokens"]  # type: ignore[operator]
    # Batch norm in evaluation mode before any training divides by sqrt(1 + 1e-5) alone.
    expected = tokens.transpose(1, 2).unflatten(2, (4, 6)) / (1 + maps.norm.eps) ** 0.5
    finer, own, coarser = maps(images).values()
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(coarser, F.avg_pool2d(expected, 2))
    torch.testing.assert_close(finer, F.interpolate(expected, scale_factor=2, mode="bilinear"))


def test_outputs_are_mixed_up_between_places() -> None:
    """Oracle: a plain loop over maps, rows and columns, in the order of torchvision's anchors."""
    torch.manual_seed(0)
    head = LinearHead(6, 2, 3)
    maps = [torch.randn(2, 6, 4, 2), torch.randn(2, 6, 2, 1)]
    found = head(maps)
    rows = []
    for layer, level in zip(head.layers, maps, strict=True):
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                rows.append(level[:, :, y, x] @ layer.weight[:, :, 0, 0].T + layer.bias)
    expected = torch.stack(rows, dim=1)  # [B, n, classes + 5]
    torch.testing.assert_close(found["cls_logits"], expected[..., :3])
    torch.testing.assert_close(found["bbox_regression"], F.softplus(expected[..., 3:7]))
    torch.testing.assert_close(found["bbox_ctrness"], expected[..., 7:])


def test_probe_has_a_hidden_layer() -> None:
    model = DetectionModel(make_model(), SETTINGS, 3)
    trained = trained_state(model, model.backbone)
    shapes = {name: tuple(value.shape) for name, value in trained.items() if name.endswith("weight")}
    assert sorted(shapes.values()) == [(8, 48, 1, 1)] * 4 + [(48,)]  # a layer a map, and the batch norm
    assert not any(".features.backbone." in name for name in trained)


def test_first_boxes_are_far_from_the_objects() -> None:
    head = LinearHead(2, 1, 3)
    found = head([torch.zeros(1, 2, 1, 1)])
    torch.testing.assert_close(found["bbox_regression"], torch.full((1, 1, 4), 4.0))
    torch.testing.assert_close(found["cls_logits"].sigmoid(), torch.full((1, 1, 3), 0.01))


def test_probe_does_not_learn() -> None:
    """Two bright squares on black, always at the same places: it must find both after a few steps."""
    torch.manual_seed(0)
    model = DetectionModel(make_model(8), dataclasses.replace(SETTINGS, score_threshold=0.05), 2).train()
    image = torch.zeros(3, 64, 64)
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0], [32.0, 32.0, 56.0, 56.0]])
    for number, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[number, top:bottom, left:right] = 1.0
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(100):
        loss = torch.stack(list(model.losses([(image, dict(target))] * 2, "cpu").values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval().predict((image * 255).to(torch.uint8))
    best = {int(label): box for label, box in zip(found["labels"].flip(0), found["boxes"].flip(0), strict=True)}
    for label, box in zip((1, 2), boxes, strict=True):
        assert float(box_iou(best[label][None], box[None])) > 0.5
