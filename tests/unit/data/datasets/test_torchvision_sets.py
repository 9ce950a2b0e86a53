"""Data sets of torchvision, made here in its layout; and image files named one by one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import cifar

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.files import ImageFiles
from dinov2_equi.data.datasets.make import make_dataset


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)).save(path, quality=100)


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    for number in range(4):
        picture(data / "images" / f"{number}.jpg", 50 * number)
    (data / "variants.txt").write_text("A320\n747\n")
    (data / "images_variant_trainval.txt").write_text("0 747\n1 A320\n2 747\n")
    (data / "images_variant_test.txt").write_text("3 A320\n")


def food(root: Path) -> None:
    base = root / "food-101"
    splits = {"train": {"747": ["747/0", "747/2"], "A320": ["A320/1"]}, "test": {"747": [], "A320": ["A320/3"]}}
    for split, classes in splits.items():
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(classes))
        for names in classes.values():
            for name in names:
                picture(base / "images" / f"{name}.jpg", 50 * int(name[-1]))


@pytest.mark.parametrize(("name", "make"), [("FGVCAircraft", aircraft), ("Food101", food)], ids=["Aircraft", "Food"])
def test_images_or_classes_are_mixed_up(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    train, val = (make_dataset(f"torchvision:name={name}:root={tmp_path}:split={split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1)
    assert train.targets is not None and val.targets is not None
    assert [level(train, i) % 100 for i in range(3)] == [0 if t == first(train) else 50 for t in train.targets]
    assert level(val, 0) == 150
    assert train.classes == val.classes and len(train.classes) == 2
    assert val.targets[0] != first(train)
    assert train.name(1) == f"{name}/train/1"
    assert train.load_tensor(0).shape == (3, 20, 30)


def level(dataset: ImageDataset, index: int) -> int:
    """Return the value of a plain image, to the nearest 50."""
    return 50 * round(float(dataset.load_tensor(index).float().mean()) / 50)


def first(dataset: ImageDataset) -> int:
    """Return the class of the images 0 and 2: that of two of three."""
    assert dataset.targets is not None
    return max(set(dataset.targets), key=dataset.targets.count)


def test_cifar_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "check_integrity", lambda *arguments: True)  # these are not the real files
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": np.full((2, 3072), 10 * number, dtype=np.uint8), "labels": [number, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    val = make_dataset(f"torchvision:name=CIFAR10:root={tmp_path}:split=val")
    assert (val.targets, val.classes) == ([5, 0], list("abcdefghij"))
    assert val.load_tensor(1).shape == (3, 32, 32)
    assert int(val.load_tensor(1)[0, 0, 0]) == 50


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("torchvision:name=CIFAR11:root=x", ("did you mean 'CIFAR10'", "Food101")),
        ("torchvision:name=CIFAR10:root=x:split=test", ("train or val", "'test'")),
        ("torchvision:root=x", ("needs a name",)),
        ("torchvision:name=CIFAR10", ("needs a root",)),
        ("torchvision:name=Food101:root=x", ("is not in x", "food-101", "download=True")),
        ("torchvision:name=CIFAR100:root=x", ("is not in x", "cifar-100-python", "download=True")),
    ],
)
def test_missing_data_set_is_not_explained(spec: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(DatasetError) as caught:
        make_dataset(spec)
    assert [part for part in parts if part not in str(caught.value)] == []


# -------------------------------------------------------------------------------------------------------- image files


def test_files_are_sorted_or_have_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("b.png", "a.png")):
        picture(tmp_path / name, 100 * number)
    files = ImageFiles([tmp_path / "b.png", str(tmp_path / "a.png")])
    assert [level(files, index) for index in range(2)] == [0, 100]
    assert files.name(0) == str(tmp_path / "b.png")
    assert files.load(1).size == (30, 20)
    assert (files.targets, files.classes) == (None, [])
    with pytest.raises(IndexError, match="2 images"):
        files.load(2)


def test_missing_file_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file: nothing.png"):
        ImageFiles(["nothing.png"])
    with pytest.raises(DatasetError, match="at least one image file"):
        ImageFiles([])
