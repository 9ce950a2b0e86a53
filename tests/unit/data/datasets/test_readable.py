"""An unreadable image is passed over, and its class kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.readable import ReadableImages


def write(root: Path, classes: str, broken: str) -> ReadableImages:
    """Write one image for each letter, grey level 10 times its place, in a folder named after the letter."""
    for number, letter in enumerate(classes):
        path = root / letter / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (10 * number,) * 3).save(path)
        if str(number) in broken:
            path.write_bytes(b"")
    return ReadableImages(ImageFolder(root))


def levels(dataset: ReadableImages) -> list[int]:
    assert [image.getpixel((0, 0))[0] for image in map(dataset.load, range(len(dataset)))] == [
        int(dataset.load_tensor(index)[0, 0, 0]) for index in range(len(dataset))
    ]
    return [int(dataset.load_tensor(index)[0, 0, 0]) // 10 for index in range(len(dataset))]


def test_the_next_image_of_the_same_class_stands_in_and_the_last_one_takes_the_first(tmp_path: Path) -> None:
    dataset = write(tmp_path, "aaabbb", broken="135")
    assert levels(dataset) == [0, 2, 2, 4, 4, 4]
    assert dataset.targets == [0, 0, 0, 1, 1, 1] and dataset.classes == ["a", "b"]
    assert dataset.name(1) == "a/1.png"


def test_without_classes_the_next_image_stands_in(tmp_path: Path) -> None:
    dataset = write(tmp_path, "aaaa", broken="03")
    assert dataset.targets is None and levels(dataset) == [1, 1, 2, 1]


def test_each_unreadable_image_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write(tmp_path, "aaa", broken="1")
    with caplog.at_level(logging.WARNING):
        levels(dataset)
    assert ["1.png" in record.getMessage() for record in caplog.records] == [True]


def test_a_class_without_a_readable_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"from number 0 on.*1\.png"):
        write(tmp_path, "aab", broken="01").load(0)
