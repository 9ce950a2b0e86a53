"""ImageNet in torchvision's folder layout, and DINOv2's index files of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets import image_net
from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.image_net import ImageNet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file in ("train/n01/a.JPEG", "train/n02/b.JPEG", "train/n02/c.JPEG", "val/n01/d.JPEG", "val/n02/e.JPEG"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / file, format="JPEG")
    return tmp_path


def test_splits_hold_their_images_and_classes(root: Path) -> None:
    train, val = ImageNet(root, "TRAIN"), ImageNet(root, "VAL")
    assert (len(train), train.targets, train.classes) == (3, [0, 1, 1], ["n01", "n02"])
    assert (len(val), val.targets, val.classes) == (2, [0, 1], ["n01", "n02"])
    assert val.name(1) == "n02/e.JPEG"


def test_unknown_split_lists_the_known_ones(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"TRAIN, VAL.*'train'"):
        ImageNet(root, "train")


def test_missing_folder_says_what_was_looked_for_and_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/train.*Set root"):
        ImageNet(tmp_path)


@pytest.fixture
def named_as_in_image_net(tmp_path: Path) -> Path:
    files = [
        "train/n01/n01_10.JPEG",
        "train/n01/n01_9.JPEG",
        "train/n022/n022_3.JPEG",
        "val/n01/ILSVRC2012_val_00000293.JPEG",
        "val/n022/ILSVRC2012_val_00000001.JPEG",
    ]
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6)).save(tmp_path / file, format="JPEG")
    (tmp_path / "labels.txt").write_text('n01,tench\nn022,"goldfish, small"\n')
    return tmp_path


def test_index_files_are_written_once_in_the_layout_of_dinov2(named_as_in_image_net: Path) -> None:
    root, extra = named_as_in_image_net, named_as_in_image_net / "deep" / "extra"
    found = ImageNet(root, "TRAIN", extra)
    assert sorted(path.name for path in extra.iterdir()) == [
        "class-ids-TRAIN.npy",
        "class-names-TRAIN.npy",
        "entries-TRAIN.npy",
    ]
    entries, ids, names = (np.load(extra / f"{name}-TRAIN.npy") for name in ("entries", "class-ids", "class-names"))
    assert entries.dtype.descr == [
        ("actual_index", "<u4"),
        ("class_index", "<u4"),
        ("class_id", "<U4"),
        ("class_name", "<U15"),
    ]
    assert entries.tolist() == [
        (10, 0, "n01", "tench"),
        (9, 0, "n01", "tench"),
        (3, 1, "n022", "goldfish, small"),
    ]
    assert ids.tolist() == ["n01", "n022"] and names.tolist() == ["tench", "goldfish, small"]
    before = {file: file.stat().st_mtime_ns for file in extra.iterdir()}
    again = ImageNet(root, "TRAIN", extra)
    for index in range(3):
        assert again.name(index) == found.name(index) and again.load(index).size == found.load(index).size
    assert again.targets == found.targets == [0, 0, 1] and again.classes == found.classes == ["n01", "n022"]
    assert before == {file: file.stat().st_mtime_ns for file in extra.iterdir()}


def test_index_files_take_the_place_of_the_search(named_as_in_image_net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = named_as_in_image_net / "extra"
    ImageNet(named_as_in_image_net, "VAL", extra)
    monkeypatch.setattr(image_net, "ImageFolder", lambda folder: pytest.fail("searched again without need"))
    val = ImageNet(named_as_in_image_net, "VAL", extra)
    assert val.name(0) == "n01/ILSVRC2012_val_00000293.JPEG" and val.load(0).width == 11


def test_index_files_of_other_images_or_damaged_ones_are_named(named_as_in_image_net: Path) -> None:
    root, extra = named_as_in_image_net, named_as_in_image_net / "extra"
    ImageNet(root, "TRAIN", extra)
    shutil.move(root / "train" / "n01", root / "train" / "n03")
    shutil.move(root / "train" / "n022", root / "train" / "n04")
    with pytest.raises(DatasetError, match=r"entries-TRAIN\.npy lists 3 images, and none of 3 looked for"):
        ImageNet(root, "TRAIN", extra)
    np.save(extra / "entries-TRAIN.npy", np.array([{"class_id": "n01"}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"entries-TRAIN\.npy .*cannot be read.*Delete them"):
        ImageNet(root, "TRAIN", extra)


def test_images_named_otherwise_have_no_index_files_and_are_used_all_the_same(root: Path) -> None:
    assert len(ImageNet(root, "TRAIN", root / "extra")) == 3
    assert not (root / "extra").exists()
