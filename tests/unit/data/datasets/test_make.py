"""Strings that name data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.image_net import ImageNet
from dinov2_equi.data.datasets.make import make_dataset, make_train_and_val
from dinov2_equi.data.datasets.sample_photos import SamplePhotos
from dinov2_equi.data.datasets.synthetic import SyntheticImages


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)


def test_sample_photos_and_its_options() -> None:
    dataset = make_dataset("sample_photos")
    assert isinstance(dataset, SamplePhotos) and dataset.split == "TRAIN" and len(dataset) == 2000
    dataset = make_dataset("sample_photos:split=VAL:regions=12")
    assert isinstance(dataset, SamplePhotos) and dataset.split == "VAL" and len(dataset) == 12


def test_synthetic_and_its_options() -> None:
    dataset = make_dataset("synthetic:length=5:size=16x24:seed=3")
    assert isinstance(dataset, SyntheticImages) and len(dataset) == 5 and dataset.size == (16, 24)
    default = make_dataset("synthetic")
    assert len(default) == 64 and default.load(0).size == (128, 96)


def test_image_net_as_dinov2_writes_it(tmp_path: Path) -> None:
    save_image(tmp_path / "val" / "n01" / "x.png")
    dataset = make_dataset(f"ImageNet:split=VAL:root={tmp_path}:extra={tmp_path / 'extra'}")
    assert isinstance(dataset, ImageNet) and len(dataset) == 1


@pytest.mark.parametrize("form", ["{root}", "folder:root={root}", " {root} "])
def test_folder_forms(tmp_path: Path, form: str) -> None:
    save_image(tmp_path / "with:colon" / "x.png")
    dataset = make_dataset(form.format(root=tmp_path / "with:colon"))
    assert isinstance(dataset, ImageFolder) and len(dataset) == 1


def test_folder_of_the_working_directory_without_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "pets" / "x.png")
    monkeypatch.chdir(tmp_path)
    assert len(make_dataset("pets")) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sample_photo", "did you mean 'sample_photos'"),
        ("imagenet:split=TRAIN:root=/x", "did you mean 'ImageNet'"),
        ("LAION", "sample_photos.*synthetic.*ImageNet.*folder"),
        ("", "Known forms"),
        ("sample_photos:splitt=VAL", "did you mean 'split'"),
        ("sample_photos:regions=many", "whole number; got 'many'"),
        ("sample_photos:regions=1:regions=2", "twice"),
        ("synthetic:size=96", "HxW.*'96'"),
        ("ImageNet:split=TRAIN", "needs a root"),
        ("folder:root=", "needs a root"),
        ("/no/such/folder", "no such folder: /no/such/folder"),
    ],
)
def test_faulty_string_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        make_dataset(spec)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_of_two_parts_is_read_otherwise_than_the_parts(tmp_path: Path, name: str) -> None:
    for part, count in (("train", 2), (name, 1)):
        (tmp_path / part).mkdir()
        for number in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / part / f"{number}.png")
    words = (str(tmp_path / "train"), str(tmp_path / name))
    for train, val in (make_train_and_val(str(tmp_path), None, None), make_train_and_val(None, *words)):
        assert (len(train), len(val)) == (2, 1)
    for wrong in ((None, None, None), (None, words[0], None), (str(tmp_path), *words)):
        with pytest.raises(DatasetError, match="both --train and --val"):
            make_train_and_val(*wrong)
    with pytest.raises(DatasetError, match="each with one sub-folder a class"):
        make_train_and_val(str(tmp_path / "train"), None, None)
