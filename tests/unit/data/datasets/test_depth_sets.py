"""NYUv2 and KITTI as they lie on disk, and depth of any folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.depth_sets import (
    eigen_crop_kitti,
    eigen_crop_nyu,
    garg_crop,
    kitti_window,
    make_depth_set,
)


def write_pair(image: Path, depth: Path, values: np.ndarray, size: tuple[int, int] | None = None) -> None:
    for path in (image, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size or values.shape
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(image)
    Image.fromarray(values.astype(np.uint16)).save(depth)


def test_unknown_depth_counts(tmp_path: Path) -> None:
    values = np.array([[0, 65535, 500], [1500, 2000, 9000]])
    for name in ("1", "2"):
        write_pair(tmp_path / f"{name}.color.jpg", tmp_path / f"{name}.depth.png", values)
    dataset = make_depth_set("folder", tmp_path, "train", max_depth=8.0)
    image, depth = dataset.load(0)
    assert image.shape == (3, 2, 3) and image.dtype == torch.uint8
    assert depth.tolist() == [[[0, 0, 0.5], [1.5, 2.0, 9.0]]]
    assert dataset.is_measured(depth).tolist() == [[[False, False, True], [True, True, False]]]
    assert make_depth_set("folder", tmp_path, "val", units_per_metre=500.0).load(0)[1][0, 1, 1] == 4.0


def test_depth_of_another_size_than_its_image_is_taken(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_pair(tmp_path / f"images/{name}.jpg", tmp_path / f"depth/{name}.png", np.ones((4, 6)), size=(8, 12))
    with pytest.raises(DatasetError, match=r"1\.png is 6 x 4 pixels, but its image .*1\.jpg is 12 x 8"):
        make_depth_set("folder", tmp_path, "train").load(0)


def test_depth_of_8_bits_is_taken_for_millimetres(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_pair(tmp_path / f"images/{name}.png", tmp_path / f"depth/{name}.png", np.ones((4, 6)))
        Image.fromarray(np.full((4, 6), 200, np.uint8)).save(tmp_path / f"depth/{name}.png")
    with pytest.raises(DatasetError, match=r"depth/1\.png has 8 bits a pixel, which end at 0\.26 m .*units-per-metre"):
        make_depth_set("folder", tmp_path, "train").load(0)
    assert (make_depth_set("folder", tmp_path, "train", units_per_metre=100.0).load(0)[1] == 2.0).all()


@pytest.mark.parametrize("mode", ["L", "I;16", "LA"])
def test_grey_image_has_one_channel(tmp_path: Path, mode: str) -> None:
    for name in ("1", "2"):
        write_pair(tmp_path / f"images/{name}.png", tmp_path / f"depth/{name}.png", np.full((4, 6), 1000))
        value = 40000 if mode == "I;16" else 120
        grey = np.full((4, 6), value, np.uint16 if mode == "I;16" else np.uint8)
        (Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey).convert(mode)).save(
            tmp_path / f"images/{name}.png"
        )
    image, depth = make_depth_set("folder", tmp_path, "train").load(0)
    assert image.shape == (3, 4, 6) and torch.equal(image[0], image[2]) and 100 < int(image[0, 0, 0]) < 200
    assert (depth == 1.0).all()


def test_missing_folder_does_not_say_how_it_must_lie(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no folder .*nowhere; it would hold one of images, .*\.depth"):
        make_depth_set("folder", tmp_path / "nowhere", "train")


@pytest.mark.parametrize("layout", ["list", "folders"])
def test_nyu_is_read_wrongly(tmp_path: Path, layout: str) -> None:
    values = np.full((480, 640), 2500)
    train, test = tmp_path / "sync/kitchen_0028b", tmp_path / "official_splits/test/bathroom"
    write_pair(train / "rgb_00045.jpg", train / "sync_depth_00045.png", values)
    write_pair(test / "rgb_00001.jpg", test / "sync_depth_00001.png", values)
    if layout == "list":
        line = "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579\n"
        (tmp_path / "nyu_train.txt").write_text(line)
        (tmp_path / "nyudepthv2_test_files_with_gt.txt").write_text(
            "bathroom/rgb_00001.jpg bathroom/sync_depth_00001.png 518.8579\n"
        )
    image, depth = make_depth_set("nyu", tmp_path, "train").load(0)
    assert image.shape == (3, 427, 565) and float(depth[0, 0, 0]) == 2.5  # without the white frame
    val = make_depth_set("nyu", tmp_path, "val")
    image, depth = val.load(0)
    assert image.shape == (3, 480, 640) and val.max_depth == 10.0
    measured = val.is_measured(depth)[0]
    rows, columns = measured.any(dim=1).nonzero().flatten(), measured.any(dim=0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 600)


def test_kitti_is_read_wrongly(tmp_path: Path) -> None:
    image = "2011_09_26/2011_09_26_drive_0057_sync/image_02/data/0000000311.png"
    depth = "2011_09_26_drive_0057_sync/proj_depth/groundtruth/image_02/0000000311.png"
    values = np.full((375, 1242), 256 * 20)
    values[-1] = 256 * 90
    write_pair(tmp_path / "input" / image, tmp_path / "gt_depth" / depth, values)
    for name in ("kitti_eigen_train.txt", "kitti_eigen_test.txt"):
        (tmp_path / name).write_text(f"{image} {depth} 721.5377\n2011_09_26/none.png None 721.5377\n")
    dataset = make_depth_set("kitti", tmp_path, "val")
    assert len(dataset) == 1
    picture, found = dataset.load(0)
    assert picture.shape == (3, 352, 1216) and float(found[0, 0, 0]) == 20.0 and float(found[0, -1, 0]) == 90.0
    measured = dataset.is_measured(found)[0]
    rows, columns = measured.any(dim=1).nonzero().flatten(), measured.any(dim=0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (143, 348, 43, 1171)
    assert make_depth_set("kitti", tmp_path, "val", crop="none").is_measured(found)[0, :-1].all()


def test_crops_and_windows() -> None:
    # Numbers of the published evaluation scripts for 375 x 1242 and 480 x 640 pixels.
    assert garg_crop(375, 1242) == (153, 44, 371, 1197)
    assert eigen_crop_kitti(375, 1242) == (124, 44, 342, 1197)
    assert eigen_crop_nyu(480, 640) == (45, 41, 471, 601) and eigen_crop_nyu(240, 320) == (22, 20, 236, 300)
    assert kitti_window(375, 1242) == (23, 13, 375, 1229)
    with pytest.raises(DatasetError, match="at least 1216 x 352 pixels, got 1242 x 300"):
        kitti_window(300, 1242)


@pytest.mark.parametrize(
    ("layout", "message"),
    [("nyu", r"looked for nyu_train\.txt.*must lie as"), ("kitti", r"looked for kitti_eigen_train\.txt.*must lie as")],
)
def test_missing_data_set_gives_no_way_to_get_it(tmp_path: Path, layout: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        make_depth_set(layout, tmp_path, "train")


def test_file_of_a_list_is_missing(tmp_path: Path) -> None:
    (tmp_path / "nyu_train.txt").write_text("a.jpg b.png 1\n")
    with pytest.raises(DatasetError, match=r"2 of 2 files are missing, the first is .*a\.jpg"):
        make_depth_set("nyu", tmp_path, "train")
    (tmp_path / "nyu_train.txt").write_text("a.jpg\n")
    with pytest.raises(DatasetError, match=r"expected `image depth \[focal\]` in line 1"):
        make_depth_set("nyu", tmp_path, "train")


def test_unknown_layout_is_taken(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="a layout of folder, nyu, kitti"):
        make_depth_set("sun", tmp_path, "train")
