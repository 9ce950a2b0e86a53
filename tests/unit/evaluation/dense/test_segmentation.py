"""Head, training crops and prediction of segmentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinov2_equi.data.datasets.pairs import Pair
from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet
from dinov2_equi.evaluation.dense.segmentation import SegmentationAugmentation, SegmentationModel, SegmentationSettings
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels, random_backbone

SMALL = SegmentationSettings(resize=30, crop=21, stride=13, steps=2, warmup_steps=1, batch_size=2)


def make_model(head: str = "linear", *, finetune: bool = False) -> SegmentationModel:
    backbone = random_backbone("vit_test_tiny", img_size=32, patch_size=8)
    settings = dataclasses.replace(SMALL, head=head, finetune=finetune)
    return SegmentationModel(EvalModel(name="tiny", backbone=backbone, patch_size=8), settings, 4)


@pytest.mark.parametrize(("head", "width"), [("linear", 48), ("multiscale", 3 * 48)])
def test_logits_have_another_size_than_the_image(head: str, width: int) -> None:
    model = make_model(head)
    assert model.head[0].num_features == width  # the network has three blocks
    assert model(torch.rand(2, 3, 21, 34)).shape == (2, 4, 21, 34)


def test_loss_differs_from_cross_entropy_over_the_pixels_with_a_class() -> None:
    model = make_model().eval()
    images, labels = torch.rand(2, 3, 16, 24), torch.randint(0, 4, (2, 1, 16, 24))
    labels[:, :, :5] = IGNORE
    kept = labels.squeeze(1) != IGNORE
    logits = model(images).permute(0, 2, 3, 1)[kept]
    wanted = F.cross_entropy(logits, labels.squeeze(1)[kept])
    assert torch.allclose(model.loss(images, labels), wanted, atol=1e-6)  # sums in another order
    assert model.loss(images, torch.full_like(labels, IGNORE)).item() == 0.0


def test_gradients_reach_a_frozen_backbone() -> None:
    for finetune in (False, True):
        model = make_model(finetune=finetune)
        model.loss(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.int64)).backward()
        reached = any(parameter.grad is not None for parameter in model.features.backbone.parameters())
        assert reached == finetune and model.head[1].weight.grad is not None


@pytest.mark.parametrize("size", [(30, 40), (31, 23), (64, 20)])
def test_prediction_has_another_size_than_the_image(size: tuple[int, int]) -> None:
    model = make_model().eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    settings = dataclasses.replace(SMALL, test_scales=(0.7, 1.0), flip_test=True)
    found = model.predict(image, settings)
    assert found.shape == (1, *size) and found.dtype == torch.int64 and 0 <= found.min() and found.max() < 4


def test_prediction_of_one_window_differs_from_the_logits() -> None:
    model = make_model().eval()
    torch.nn.init.normal_(model.head[1].weight)
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    settings = dataclasses.replace(SMALL, resize=24, crop=32, stride=32)
    assert torch.equal(model.predict(image, settings), model(image[None] / 255).argmax(dim=1))


def test_pixels_as_backbone_have_no_classes() -> None:
    model = SegmentationModel(EvalModel(name="pixels", backbone=RawPixels(), patch_size=1), SMALL, 4)
    assert model(torch.rand(1, 3, 30, 41)).shape == (1, 4, 30, 41)


def test_classes_of_a_crop_belong_to_other_pixels(tmp_path: Path) -> None:
    """Class 0 is dark and class 1 bright, in stripes: what a crop shows must match what it is called."""
    stripes = (np.arange(40) // 10 % 2)[None].repeat(30, axis=0)
    pair = Pair(tmp_path / "a.png", tmp_path / "b.png")
    Image.fromarray(np.stack([stripes * 255] * 3, axis=-1).astype(np.uint8)).save(pair.image)
    Image.fromarray(stripes.astype(np.uint8)).save(pair.label)
    dataset = SegmentationSet([pair], ("dark", "bright"))
    augment = SegmentationAugmentation(dataclasses.replace(SMALL, photometric=False, crop=32), dataset)
    for seed in range(6):
        torch.manual_seed(seed)
        image, labels = augment(0)
        assert image.shape == (3, 32, 32) and labels.shape == (1, 32, 32) and labels.dtype == torch.int64
        assert set(labels.unique().tolist()) <= {0, 1, IGNORE}
        bright = image.mean(dim=0) > 0.5
        kept = labels[0] != IGNORE
        # Resizing blurs the edges: up to two columns of a stripe of at least five may fall on the other side.
        assert ((labels[0] == 1) == bright)[kept].float().mean() > 0.85


@pytest.mark.parametrize(
    ("values", "message"),
    [({"head": "upernet"}, "linear, multiscale"), ({"stride": 30}, "stride <= crop"), ({"least_scale": 3.0}, "scale")],
)
def test_wrong_recipe_is_taken(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **values).check()  # type: ignore[arg-type]
