"""Pairs of image and label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.pairs import PairNames, find_pairs, read_label_image

NAMES = PairNames(("images",), ("labels", "masks"), (".label", "_label"), (".color", "rgb_"))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path, split: str) -> list[tuple[str, str]]:
    pairs = find_pairs(root, split, NAMES)
    return [(p.image.relative_to(root).as_posix(), p.label.relative_to(root).as_posix()) for p in pairs]


def test_folders_with_splits_in_them(tmp_path: Path) -> None:
    touch(tmp_path, "images/train/a/1.jpg", "masks/train/a/1.png", "images/val/2.jpg", "masks/val/2_label.png")
    assert found(tmp_path, "train") == [("images/train/a/1.jpg", "masks/train/a/1.png")]
    assert found(tmp_path, "val") == [("images/val/2.jpg", "masks/val/2_label.png")]


def test_splits_with_folders_in_them(tmp_path: Path) -> None:
    touch(tmp_path, "training/images/1.jpg", "training/labels/1.png", "test/images/2.jpg", "test/labels/2.png")
    assert found(tmp_path, "train") == [("training/images/1.jpg", "training/labels/1.png")]
    assert found(tmp_path, "val") == [("test/images/2.jpg", "test/labels/2.png")]


def test_files_side_by_side(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/1.color.jpg", "train/1.label.png", "train/3.color.jpg", "val/b/rgb_2.jpg", "val/b/2_label.png"
    )
    assert found(tmp_path, "train") == [("train/1.color.jpg", "train/1.label.png")]
    assert found(tmp_path, "val") == [("val/b/rgb_2.jpg", "val/b/2_label.png")]


def test_image_is_in_both_halves_of_a_folder_without_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{i}.jpg" for i in range(10)), *(f"labels/{i}.png" for i in range(10)))
    train, val = found(tmp_path, "train"), found(tmp_path, "val")
    assert [image for image, _ in train] == [f"images/{i}.jpg" for i in range(8)] and len(val) == 2
    assert not set(train) & set(val)


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ((), "train", "no pairs of images and labels in"),
        (("images/1.jpg", "images/2.jpg", "labels/1.png"), "train", r"images/2\.jpg has no labels"),
        (("images/1.jpg", "labels/1.png"), "train", "one pair only"),
        (("images/1.jpg",), "test", "one of the splits train, val, got 'test'"),
    ],
)
def test_folder_that_holds_no_pairs_gives_no_reason(
    tmp_path: Path, names: tuple[str, ...], split: str, message: str
) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DatasetError, match=message):
        find_pairs(tmp_path, split, NAMES)
    with pytest.raises(DatasetError, match="there is no folder"):
        find_pairs(tmp_path / "nowhere", "train", NAMES)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_values_of_a_label_image_are_changed(tmp_path: Path, mode: str) -> None:
    top = {"1": 2, "I;16": 60000}.get(mode, 200)
    values = np.random.default_rng(0).integers(0, top, (5, 7))
    dtype = {"1": bool, "I;16": np.uint16}.get(mode, np.uint8)
    image = Image.fromarray(values.astype(dtype))
    if mode == "P":
        image = Image.new("P", (7, 5))
        image.putdata(values.flatten().tolist())
        image.putpalette([(31 * i) % 256 for i in range(768)])
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_label_image(tmp_path / "a.png"), values)


def test_coloured_or_broken_label_image_is_taken(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "rgb.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"rgb\.png to have one channel"):
        read_label_image(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImageError, match=r"cannot read the label image .*broken\.png"):
        read_label_image(tmp_path / "broken.png")
