"""Folders of images: what is found, in which order, with which classes, and what is said when nothing is."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.folder import ImageFolder


def save_image(path: Path, color: tuple[int, int, int] = (9, 8, 7), size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def names(dataset: ImageFolder) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


def test_every_suffix_in_any_case_at_any_depth(tmp_path: Path) -> None:
    files = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.tif", "deep/er/g.TIFF"]
    for file in files:
        save_image(tmp_path / file)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "jpg").write_text("no image")
    dataset = ImageFolder(tmp_path)
    assert names(dataset) == sorted(files)
    assert all(dataset.load(index).size == (6, 4) for index in range(len(files)))


def test_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    for folder, order in (("one", "bca"), ("two", "cab")):
        for letter in order:
            save_image(tmp_path / folder / "x" / f"{letter}.png")
            save_image(tmp_path / folder / f"{letter}.png")
    assert names(ImageFolder(tmp_path / "one")) == names(ImageFolder(tmp_path / "two"))


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    for file in ("seen.jpg", "._seen.jpg", ".cache/hidden.jpg"):
        save_image(tmp_path / file)
    assert names(ImageFolder(tmp_path)) == ["seen.jpg"]


def test_linked_folder_is_followed_and_a_circle_ends(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere" / "x.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert names(ImageFolder(tmp_path / "root")) == ["link/x.jpg"]


def test_a_link_to_itself_makes_a_folder_unusable(tmp_path: Path) -> None:
    save_image(tmp_path / "x.jpg")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert names(ImageFolder(tmp_path)) == ["x.jpg"]


def test_folder_that_cannot_be_read_is_left_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("closed", "open"):
        save_image(tmp_path / name / "x.png")
    scandir = os.scandir

    def without_permission(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError("no permission")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", without_permission)
    assert names(ImageFolder(tmp_path)) == ["open/x.png"]
    assert f"{tmp_path}/closed cannot be read, its images are left out: no permission" in caplog.text


def test_unusual_file_names_are_loaded(tmp_path: Path) -> None:
    files = ["with space.png", "münchen.png", "日本.png", "a:b=c.png"]
    for file in files:
        save_image(tmp_path / file)
    dataset = ImageFolder(tmp_path)
    assert sorted(names(dataset)) == sorted(files)
    assert dataset.load(0).mode == "RGB"


def test_file_name_that_is_not_utf8_is_loaded(tmp_path: Path) -> None:
    save_image(tmp_path / "x.png")
    raw = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        os.rename(tmp_path / "x.png", raw)  # noqa: PTH104 (a name of bytes)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert ImageFolder(tmp_path).load(0).size == (6, 4)


def test_class_folders_give_targets(tmp_path: Path) -> None:
    for file in ("dog/2.png", "cat/deep/1.png", "dog/1.png"):
        save_image(tmp_path / file)
    dataset = ImageFolder(tmp_path)
    assert names(dataset) == ["cat/deep/1.png", "dog/1.png", "dog/2.png"]
    assert dataset.classes == ["cat", "dog"]
    assert dataset.targets == [0, 1, 1]


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["only/1.png", "only/2.png"], ["a/1.png", "b/1.png", "1.png"]])
def test_folders_that_tell_nothing_apart_give_no_targets(tmp_path: Path, files: list[str]) -> None:
    for file in files:
        save_image(tmp_path / file)
    dataset = ImageFolder(tmp_path)
    assert dataset.targets is None
    assert dataset.classes == []


def test_train_and_val_are_not_taken_for_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_image(tmp_path / "train" / "cat" / "1.png")
    save_image(tmp_path / "val" / "cat" / "1.png")
    logging.getLogger("dinov2_equi").addHandler(caplog.handler)
    try:
        dataset = ImageFolder(tmp_path)
    finally:
        logging.getLogger("dinov2_equi").removeHandler(caplog.handler)
    assert dataset.targets is None
    assert "look like splits" in caplog.text and str(tmp_path / "train") in caplog.text


def test_tensor_has_the_pixels_of_the_image(tmp_path: Path) -> None:
    save_image(tmp_path / "x.png", (1, 2, 3))
    tensor = ImageFolder(tmp_path).load_tensor(0)
    assert tensor.shape == (3, 4, 6)
    assert tensor[:, 3, 5].tolist() == [1, 2, 3]


def test_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    save_image(tmp_path / "x.jpg", size=(300, 200))
    dataset = ImageFolder(tmp_path)
    assert dataset.load_tensor(0, 100).shape == (3, 100, 150)
    assert dataset.load_tensor(0).shape == (3, 200, 300)
    assert dataset.load(0).size == (300, 200)


def test_unreadable_image_is_named_when_it_is_loaded_and_not_before(tmp_path: Path) -> None:
    save_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    dataset = ImageFolder(tmp_path)
    dataset.load(1)
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        dataset.load(0)
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        dataset.load_tensor(0, 32)


@pytest.mark.parametrize("index", [-1, 1])
def test_index_outside_is_an_index_error(tmp_path: Path, index: int) -> None:
    save_image(tmp_path / "x.png")
    with pytest.raises(IndexError, match=f"got index {index}"):
        ImageFolder(tmp_path).load(index)


def test_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"it is empty.*\.jpg"):
        ImageFolder(tmp_path)


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(DatasetError, match=r"7 entries \(0\.txt, 1\.txt.*\.\.\.\).*\.webp"):
        ImageFolder(tmp_path)


def test_missing_folder_says_how_far_the_path_exists(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/no/where.*{tmp_path} exists"):
        ImageFolder(tmp_path / "no" / "where")


def test_file_instead_of_a_folder_says_so(tmp_path: Path) -> None:
    save_image(tmp_path / "x.png")
    with pytest.raises(DatasetError, match="is a file"):
        ImageFolder(tmp_path / "x.png")
