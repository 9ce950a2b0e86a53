"""Features on disk: the right ones, once for each thing they depend on, and never half of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import random_backbone
from dinov2_equi.evaluation.stored_features import stored_features

SIZE = 32


@pytest.fixture(scope="module")
def model() -> EvalModel:
    return EvalModel("tiny", random_backbone("vit_test_tiny", img_size=SIZE, patch_size=8), patch_size=8)


@pytest.fixture(scope="module")
def images() -> SyntheticImages:
    return SyntheticImages(length=11, size=(40, 56), seed=0)


def folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir())


def test_stored_features_are_other_than_those_of_the_backbone(
    tmp_path: Path, model: EvalModel, images: SyntheticImages
) -> None:
    stored = stored_features(model, images, size=SIZE, folder=tmp_path, batch_size=4)
    expected = model.features(eval_images(images, SIZE, len(images)), device="cpu")
    assert stored.cls.shape == (11, 3, 48)  # as many blocks as there are, below four
    assert stored.cls.dtype == np.float16
    # float16 keeps eleven bits; the features are of order 1.
    torch.testing.assert_close(stored.select("cls"), expected["cls"], rtol=0, atol=4e-3)
    torch.testing.assert_close(stored.select("patch_mean"), expected["patch_mean"], rtol=0, atol=4e-3)
    both = torch.cat([stored.select("cls"), stored.select("patch_mean")], dim=1)
    assert torch.equal(stored.select("both"), both)
    tokens = stored.batch(np.array([7, 2]))
    assert torch.equal(tokens.cls[:, -1], stored.select("cls")[[7, 2]])
    assert torch.equal(tokens.patch_mean, stored.select("patch_mean")[[7, 2]])
    with pytest.raises(ValueError, match="choose cls, patch_mean or both"):
        stored.select("tokens")


def test_class_tokens_of_earlier_blocks_are_in_another_order(
    tmp_path: Path, model: EvalModel, images: SyntheticImages
) -> None:
    stored = stored_features(model, images, size=SIZE, folder=tmp_path)
    pixels = eval_images(images, SIZE, len(images))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    with torch.no_grad():
        layers = model.backbone.get_intermediate_layers(  # type: ignore[operator]
            (pixels - mean) / std, n=[0, 1, 2], return_class_token=True
        )
    for block, (_, cls) in enumerate(layers):
        torch.testing.assert_close(torch.from_numpy(stored.cls[:, block].astype(np.float32)), cls, rtol=0, atol=4e-3)


def test_second_run_computes_them_again_or_gives_other_digits(
    tmp_path: Path, model: EvalModel, images: SyntheticImages
) -> None:
    passes: list[int] = []
    first, second = (
        stored_features(
            model, images, size=SIZE, folder=tmp_path, batch_size=batch_size, on_batch=lambda: passes.append(1)
        )
        for batch_size in (4, 5)
    )
    assert len(passes) == 3
    assert np.array_equal(first.cls, second.cls)
    assert len(folders(tmp_path)) == 1


def test_something_they_depend_on_is_forgotten(tmp_path: Path, model: EvalModel, images: SyntheticImages) -> None:
    other = random_backbone("vit_test_tiny", img_size=SIZE, patch_size=8, seed=1)
    variants = [
        (model, images, SIZE),
        (replace(model, name="another name"), images, SIZE),  # the same features
        (replace(model, backbone=other), images, SIZE),
        (replace(model, mean=(0.5, 0.5, 0.5)), images, SIZE),
        (replace(model, std=(0.5, 0.5, 0.5)), images, SIZE),
        (model, SyntheticImages(length=11, size=(40, 56), seed=1), SIZE),
        (model, SyntheticImages(length=10, size=(40, 56), seed=0), SIZE),
        (model, images, 40),
    ]
    for number, (backbone, dataset, size) in enumerate(variants):
        stored_features(backbone, dataset, size=size, folder=tmp_path)
        assert len(folders(tmp_path)) == max(1, number)


def test_interruption_leaves_half_of_them(tmp_path: Path, model: EvalModel, images: SyntheticImages) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored_features(model, images, size=SIZE, folder=tmp_path, batch_size=4, on_batch=stop)
    assert folders(tmp_path) == []
    assert len(stored_features(model, images, size=SIZE, folder=tmp_path)) == 11
