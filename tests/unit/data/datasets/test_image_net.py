"""ImageNet in torchvision's folder layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.image_net import ImageNet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file in ("train/n01/a.JPEG", "train/n02/b.JPEG", "train/n02/c.JPEG", "val/n01/d.JPEG", "val/n02/e.JPEG"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / file, format="JPEG")
    return tmp_path


def test_splits_hold_their_images_and_classes(root: Path) -> None:
    train, val = ImageNet(root, "TRAIN"), ImageNet(root, "VAL", extra="unused")
    assert (len(train), train.targets, train.classes) == (3, [0, 1, 1], ["n01", "n02"])
    assert (len(val), val.targets, val.classes) == (2, [0, 1], ["n01", "n02"])
    assert val.name(1) == "n02/e.JPEG"


def test_unknown_split_lists_the_known_ones(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"TRAIN, VAL.*'train'"):
        ImageNet(root, "train")


def test_missing_folder_says_what_was_looked_for_and_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/train.*Set root"):
        ImageNet(tmp_path)
