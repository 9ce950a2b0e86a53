"""Heads, training crops and prediction of depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinov2_equi.data.datasets.depth_sets import DepthSet
from dinov2_equi.data.datasets.pairs import Pair
from dinov2_equi.evaluation.dense.depth import (
    DepthAugmentation,
    DepthModel,
    DepthSettings,
    constant_depth_metrics,
    evaluate_depth,
)
from dinov2_equi.evaluation.dense.depth_heads import DepthBins, LinearDepthHead
from dinov2_equi.evaluation.dense.maps import BlockMap
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels, random_backbone

SMALL = DepthSettings(bins=8, dpt_channels=8, height=24, width=32, steps=2, warmup_steps=1, batch_size=2)


def make_model(patch_size: int = 8) -> EvalModel:
    backbone = random_backbone("vit_test_tiny", img_size=32, patch_size=patch_size)
    return EvalModel(name="tiny", backbone=backbone, patch_size=patch_size)


def changed(**values: object) -> DepthSettings:
    return DepthSettings(**{**SMALL.__dict__, **values})  # type: ignore[arg-type]


@pytest.fixture
def dataset(tmp_path: Path) -> DepthSet:
    """Return three images of 40 x 30 pixels: left half 1 m away, right half 3 m, a corner unknown."""
    pairs = []
    for number in range(3):
        pixels = np.full((30, 40, 3), 40 * number, np.uint8)
        pixels[:, 20:] = 250
        depth = np.full((30, 40), 1000, np.uint16)
        depth[:, 20:] = 3000
        depth[:5, :5] = 65535
        pair = Pair(tmp_path / f"{number}.jpg", tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(pair.image)
        Image.fromarray(depth).save(pair.label)
        pairs.append(pair)
    return DepthSet(pairs, max_depth=5.0)


def test_depth_of_bins_differs_from_a_plain_loop() -> None:
    logits = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    found = DepthBins(4, 1.0, 7.0)(logits)
    for b, y, x in np.ndindex(2, 3, 2):
        weights = [max(float(logits[b, k, y, x]), 0.0) + 0.1 for k in range(4)]
        depth = sum(w * c for w, c in zip(weights, (1, 3, 5, 7), strict=True)) / sum(weights)
        assert float(found.depth[b, 0, y, x]) == pytest.approx(depth, rel=1e-5)  # float32
    assert torch.allclose(found.shares.sum(dim=1), torch.ones(2, 3, 2))


def test_linear_head_that_classifies_first_differs_from_one_that_upsamples_first() -> None:
    head = LinearDepthHead([(5, 3), (4, 2)], DepthBins(6, 1, 5), 6)
    torch.nn.init.normal_(head.classify.bias)  # type: ignore[arg-type]
    maps = [BlockMap(torch.randn(2, 5, 3, 4), torch.randn(2, 3)), BlockMap(torch.randn(2, 4, 3, 4), torch.randn(2, 2))]
    tokens = []
    for block in maps:
        tokens += [block.patches, block.cls[:, :, None, None].expand(-1, -1, 3, 4)]
    fine = F.interpolate(torch.cat(tokens, dim=1), scale_factor=4, mode="bilinear", align_corners=False)
    wanted = head.bins(head.classify(fine))
    # 1e-5: sums in another order
    assert torch.allclose(head(maps).depth, wanted.depth, atol=1e-5) and head(maps).depth.shape == (2, 1, 12, 16)


@pytest.mark.parametrize("head", ["linear", "linear4", "dpt"])
@pytest.mark.parametrize("size", [(24, 32), (21, 34)])
def test_depth_has_another_size_than_the_image_or_leaves_its_range(head: str, size: tuple[int, int]) -> None:
    model = DepthModel(make_model(), changed(head=head), 0.5, 4.0)
    found = model(torch.rand(2, 3, *size))
    assert found.depth.shape == (2, 1, *size)
    assert ((found.depth >= 0.5) & (found.depth <= 4.0)).all()
    known = torch.ones(2, 1, *size, dtype=torch.bool)
    terms = model.losses(torch.rand(2, 3, *size), torch.full((2, 1, *size), 2.0), known, changed(bins_weight=0.5))
    assert set(terms) == {"silog_loss", "gradient_loss", "bins_loss"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_pixels_as_backbone_have_no_depth() -> None:
    model = DepthModel(EvalModel(name="pixels", backbone=RawPixels(), patch_size=1), SMALL, 0.5, 4.0)
    assert model(torch.rand(1, 3, 30, 41)).depth.shape == (1, 1, 30, 41)


def test_depth_of_a_crop_belongs_to_other_pixels(dataset: DepthSet) -> None:
    augment = DepthAugmentation(changed(color_jitter=0.0, height=36, width=36, rotate_deg=0.0), dataset)
    for seed in range(5):
        torch.manual_seed(seed)
        crop = augment(0)
        assert crop.image.shape == (3, 36, 36) and crop.depth.shape == crop.known.shape == (1, 36, 36)
        assert crop.image.dtype == torch.float32 and float(crop.image.max()) <= 1
        grey = crop.image.mean(dim=0)
        assert (grey[crop.depth[0] == 3] > 0.5).all()  # JPEG blurs the edge, 250 and 0 stay apart
        assert (grey[crop.depth[0] == 1] < 0.5).all()
        assert torch.equal(crop.known, crop.depth > 0) and not crop.known.all()


def test_mirrored_image_has_another_depth(dataset: DepthSet) -> None:
    model = DepthModel(make_model(), SMALL, 0.5, 4.0).eval()
    image, _ = dataset.load(1)
    # 1e-6: the two passes are averaged in another order
    assert torch.allclose(model.predict(image.flip(-1), SMALL).flip(-1), model.predict(image, SMALL), atol=1e-6)
    assert model.predict(image, changed(resize=17)).shape == (1, 30, 40)


def test_measure_of_a_constant_differs_from_arithmetic(dataset: DepthSet) -> None:
    near = 30 * 20 - 25
    far = 30 * 20
    mean = (near * 1 + far * 3) / (near + far)
    found = constant_depth_metrics(dataset, dataset)
    wanted = (near * (mean - 1) ** 2 + far * (mean - 3) ** 2) / (near + far)
    assert found["rmse"] == pytest.approx(wanted**0.5, rel=1e-5)  # depth is float32
    scores = evaluate_depth(DepthModel(make_model(), SMALL, dataset.min_depth, dataset.max_depth), dataset, SMALL)
    assert scores["num_images"] == 3 and scores["rmse"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [({"head": "mlp"}, "linear, linear4, dpt"), ({"bins": 1}, "bins >= 2"), ({"silog_weight": 0.0}, "slopes alone")],
)
def test_wrong_recipe_is_taken(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**values).check()
