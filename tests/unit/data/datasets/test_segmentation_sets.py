"""ADE20K, Pascal VOC and CamVid as they lie on disk, and class maps of any folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.segmentation_sets import IGNORE, make_segmentation_set


def write_pair(image: Path, label: Path, values: list[list[int]], mode: str = "L") -> None:
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values, np.uint8)
    Image.fromarray(np.full((*array.shape, 3), 128, np.uint8)).save(image)
    indices = Image.fromarray(array)
    if mode == "P":
        indices = Image.new("P", indices.size)
        indices.putdata(array.flatten().tolist())
        indices.putpalette([(17 * i) % 256 for i in range(768)])
    indices.save(label)


def test_folder_of_pairs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        image, label = tmp_path / f"images/{split}/1.jpg", tmp_path / f"annotations/{split}/1.png"
        write_pair(image, label, [[0, 1, 7], [255, 2, 9]])
    found = make_segmentation_set("folder", tmp_path, "val", ignored=[9])
    image, labels = found.load(0)
    assert image.shape == (3, 2, 3) and labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 1, 7], [IGNORE, 2, IGNORE]]]
    assert found.classes == tuple(f"class {number}" for number in range(8))
    assert len(make_segmentation_set("folder", tmp_path, "val", num_classes=12).classes) == 12
    (tmp_path / "classes.txt").write_text("sky\nroad\nhouse\n")
    named = make_segmentation_set("folder", tmp_path, "train", ignored=[9])
    assert named.classes == ("sky", "road", "house")
    with pytest.raises(DatasetError, match=r"1\.png holds the values 7, expected 0 to 2 .* or 255, 9 for none"):
        named.load(0)


def test_grey_image_has_one_channel(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_pair(tmp_path / f"images/{name}.png", tmp_path / f"masks/{name}.png", [[0, 1]])
        Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / f"images/{name}.png")
    assert make_segmentation_set("folder", tmp_path, "train").load(0)[0].shape == (3, 1, 2)


@pytest.mark.parametrize("form", ["segnet", "folders"])
def test_camvid_is_read_wrongly(tmp_path: Path, form: str) -> None:
    for split in ("train", "val"):
        images, labels = (f"images/{split}", f"annotations/{split}") if form == "folders" else (split, f"{split}annot")
        write_pair(tmp_path / images / "0001TP_006690.png", tmp_path / labels / "0001TP_006690.png", [[0, 10, 11]])
    dataset = make_segmentation_set("camvid", tmp_path, "train")
    assert dataset.load(0)[1].tolist() == [[[0, 10, IGNORE]]] and len(dataset.classes) == 11


@pytest.mark.parametrize("place", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_voc_is_read_wrongly(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    for stem, folder in (("2007_1", "SegmentationClass"), ("2007_2", "SegmentationClass")):
        write_pair(root / f"JPEGImages/{stem}.jpg", root / folder / f"{stem}.png", [[0, 20, 255]], mode="P")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")
    train, val = (make_segmentation_set("voc", tmp_path, split) for split in ("train", "val"))
    assert train.load(0)[1].tolist() == [[[0, 20, IGNORE]]] and len(train.classes) == 21
    assert val.name(0).endswith("2007_2.jpg")
    for stem in ("2007_1", "2007_2"):
        write_pair(root / f"JPEGImages/{stem}.jpg", root / f"SegmentationClassAug/{stem}.png", [[5]])
    (lists / "trainaug.txt").write_text("2007_1\n2007_2\n")
    assert len(make_segmentation_set("voc", tmp_path, "train")) == 2
    assert len(make_segmentation_set("voc", tmp_path, "val")) == 1


def test_ade20k_is_read_wrongly(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        image, label = root / f"images/{split}/ADE_1.jpg", root / f"annotations/{split}/ADE_1.png"
        write_pair(image, label, [[0, 1, 150]])
    dataset = make_segmentation_set("ade20k", tmp_path, "val")
    assert dataset.load(0)[1].tolist() == [[[IGNORE, 0, 149]]] and len(dataset.classes) == 150
    rows = [f"{i}\t0.1\t1\t1\tname {i}, other {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert make_segmentation_set("ade20k", root, "train").classes[:2] == ("name 1", "name 2")


@pytest.mark.parametrize("layout", ["camvid", "voc", "ade20k"])
def test_missing_data_set_gives_no_way_to_get_it(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DatasetError, match="must lie as .* get it at http"):
        make_segmentation_set(layout, tmp_path, "train")
    with pytest.raises(DatasetError, match="there is no folder"):
        make_segmentation_set(layout, tmp_path / "nowhere", "train")


def test_file_of_a_list_is_missing(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    with pytest.raises(DatasetError, match=r"Pascal VOC 2012, train: 2 of 2 files are missing, .*2007_1\.jpg"):
        make_segmentation_set("voc", tmp_path, "train")


def test_wrong_option_is_taken(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="a layout of folder, camvid, voc, ade20k, got 'cityscapes'"):
        make_segmentation_set("cityscapes", tmp_path, "train")
    with pytest.raises(DatasetError, match="the classes of voc are fixed"):
        make_segmentation_set("voc", tmp_path, "train", num_classes=3)
