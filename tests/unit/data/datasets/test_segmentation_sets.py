"""ADE20K, Pascal VOC, Cityscapes, COCO-Stuff and CamVid as they lie on disk, and class maps of any folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.pairs import Pair
from dinov2_equi.data.datasets.segmentation_classes import CITYSCAPES_IGNORED, CITYSCAPES_VALUES
from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet, make_segmentation_set


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


def test_cityscapes_is_read_wrongly(tmp_path: Path) -> None:
    for split, city in (("train", "aachen"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        image = tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"
        write_pair(image, tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", [[0, 3, 7], [18, 19, 33]])
    dataset = make_segmentation_set("cityscapes", tmp_path, "val")
    assert dataset.load(0)[1].tolist() == [[[IGNORE, IGNORE, 0], [IGNORE, 6, 18]]]
    assert dataset.classes[6] == "traffic light" and dataset.name(0).endswith("lindau_000000_000019_leftImg8bit.png")
    label = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.array([[7, 34, 8]], np.uint8)).save(label)
    Image.fromarray(np.zeros((1, 3, 3), np.uint8)).save(make_segmentation_set("cityscapes", tmp_path, "train").name(0))
    with pytest.raises(DatasetError, match="holds the values 34, expected 7 to 8, 11 to 13, 17, 19 to 28, 31 to 33"):
        make_segmentation_set("cityscapes", tmp_path, "train").load(0)


def test_every_value_of_cityscapes_has_a_meaning() -> None:
    assert sorted(CITYSCAPES_VALUES + CITYSCAPES_IGNORED) == list(range(34))


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images/", "annotations"), ("", "stuffthingmaps"), ("", "stuffthingmaps_trainval2017")],
)
def test_coco_stuff_is_read_wrongly(tmp_path: Path, images: str, labels: str) -> None:
    (tmp_path / "annotations").mkdir()  # where the boxes lie
    for split in ("train2017", "val2017"):
        image, label = tmp_path / f"{images}{split}/000000000139.jpg", tmp_path / f"{labels}/{split}/000000000139.png"
        write_pair(image, label, [[0, 10, 12], [181, 91, 255]])
    dataset = make_segmentation_set("coco_stuff", tmp_path, "val")
    assert dataset.load(0)[1].tolist() == [[[0, 10, 11], [170, 80, IGNORE]]]
    names = [dataset.classes[number] for number in (0, 10, 11, 79, 80, 170)]
    assert names == ["person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood"]
    assert len(dataset.classes) == len(dataset.values) == 171


def test_value_above_or_below_all_classes_is_taken(tmp_path: Path) -> None:
    write_pair(tmp_path / "images/1.png", tmp_path / "masks/1.png", [[0, 1]])
    pair = Pair(tmp_path / "images/1.png", tmp_path / "masks/1.png")
    for value in (2, 256, 257, 60000):
        Image.fromarray(np.array([[0, value]], np.uint16)).save(pair.label)
        with pytest.raises(DatasetError, match=f"holds the values {value}, expected 0 to 1 for the 2 classes"):
            SegmentationSet([pair], ("dark", "bright"), ignored=(-1,)).load(0)
        found = SegmentationSet([pair], ("dark", "bright"), ignored=(value,)).load(0)[1]
        assert found.tolist() == [[[0, IGNORE]]]


@pytest.mark.parametrize("layout", ["camvid", "voc", "ade20k", "cityscapes", "coco_stuff"])
@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_missing_data_set_gives_no_way_to_get_it(tmp_path: Path, layout: str, folder: str) -> None:
    with pytest.raises(DatasetError, match=f"{tmp_path / folder}.* must lie as .* get it at http"):
        make_segmentation_set(layout, tmp_path / folder, "train")


def test_missing_folder_of_pairs_does_not_say_what_it_would_hold(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no folder .*nowhere; it would hold one of images"):
        make_segmentation_set("folder", tmp_path / "nowhere", "train")


def test_file_of_a_list_is_missing(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    with pytest.raises(DatasetError, match=r"Pascal VOC 2012, train: 2 of 2 files are missing, .*2007_1\.jpg"):
        make_segmentation_set("voc", tmp_path, "train")


def test_wrong_option_is_taken(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match="a layout of folder, camvid, voc, ade20k, cityscapes, coco_stuff, got 'coco'"
    ):
        make_segmentation_set("coco", tmp_path, "train")
    with pytest.raises(DatasetError, match="the classes of voc are fixed"):
        make_segmentation_set("voc", tmp_path, "train", num_classes=3)
