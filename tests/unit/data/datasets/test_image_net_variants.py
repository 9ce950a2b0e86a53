"""ImageNet's other test sets, in the layouts of their archives."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.image_net_variants import find_corruptions
from dinov2_equi.data.datasets.make import make_dataset


def write(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / file, format="JPEG")


@pytest.mark.parametrize(
    ("name", "inner", "classes"),
    [
        ("ImageNetV2", "", ["0", "12"]),
        ("ImageNetV2", "imagenetv2-matched-frequency-format-val", ["0", "12"]),
        ("ImageNetA", "imagenet-a", ["n01498041", "n01531178"]),
        ("ImageNetR", "imagenet-r", ["n01443537", "n01484850"]),
        ("ImageNetSketch", "sketch", ["n01440764", "n01443537"]),
    ],
)
def test_test_set_of_image_net_lies_otherwise_than_its_archive(
    tmp_path: Path, name: str, inner: str, classes: list[str]
) -> None:
    write(tmp_path / inner, *(f"{label}/a.JPEG" for label in classes))
    (tmp_path / inner / "README.txt").write_text("of the authors")
    images = make_dataset(f"{name}:root={tmp_path}")
    assert (len(images), images.targets, images.classes) == (2, [0, 1], classes)


def test_missing_test_set_does_not_say_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/none.*200 classes.*natural-adv-examples"):
        make_dataset(f"ImageNetA:root={tmp_path}/none")


def test_images_without_class_folders_are_taken_for_a_test_set(tmp_path: Path) -> None:
    write(tmp_path, "a.JPEG", "b.JPEG")
    with pytest.raises(DatasetError, match=r"no class folders.*imagenet-r"):
        make_dataset(f"ImageNetR:root={tmp_path}")


def test_corrupted_images_are_found_by_corruption_and_severity(tmp_path: Path) -> None:
    write(tmp_path, "fog/1/n01/a.JPEG", "fog/1/n02/b.JPEG", "fog/5/n01/a.JPEG", "fog/5/n02/a.JPEG", "snow/3/n01/a.JPEG")
    assert find_corruptions(tmp_path) == {"fog": [1, 5], "snow": [3]}
    images = make_dataset(f"ImageNetC:root={tmp_path}:corruption=fog:severity=5")
    assert (len(images), images.name(1)) == (2, "n02/a.JPEG")
    with pytest.raises(DatasetError, match=r"fog/2; corruptions there: fog, snow.*hendrycks/robustness"):
        make_dataset(f"ImageNetC:root={tmp_path}:corruption=fog:severity=2")
