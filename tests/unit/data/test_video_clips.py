"""Clips in the layouts of DAVIS and VIP, and in any folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.video_clips import (
    choose_clips,
    davis_clips,
    folder_clips,
    read_index_mask,
    vip_clips,
)

INDICES = np.array([[0, 1, 2], [255, 0, 1]], dtype=np.uint8)


def save_frame(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (9, 8, 7)).save(path)


def save_mask(path: Path, values: np.ndarray = INDICES, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def write_clip(frames: Path, masks: Path, count: int = 3) -> None:
    for number in range(count):
        save_frame(frames / f"{number:05d}.jpg")
        save_mask(masks / f"{number:05d}.png")


def write_davis(root: Path, resolution: str = "480p") -> None:
    for name in ("bear", "bus", "zebra"):
        write_clip(root / "JPEGImages" / resolution / name, root / "Annotations" / resolution / name)


def test_clips_of_davis_are_not_those_of_its_list(tmp_path: Path) -> None:
    write_davis(tmp_path)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("zebra\nbear\n")
    clips = davis_clips(tmp_path)
    assert [clip.name for clip in clips] == ["zebra", "bear"]
    assert [path.name for path in clips[0].frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    mask = clips[0].load_mask(2)
    assert mask is not None
    np.testing.assert_array_equal(mask, INDICES)


@pytest.mark.parametrize("resolution", ["", "Full-Resolution"])
def test_davis_without_its_list_is_refused(tmp_path: Path, resolution: str, caplog: pytest.LogCaptureFixture) -> None:
    write_davis(tmp_path, resolution)
    assert [clip.name for clip in davis_clips(tmp_path)] == ["bear", "bus", "zebra"]
    assert "val.txt: all 3 are taken" in caplog.text


@pytest.mark.parametrize("above", ["", "VIP_Fine"])
def test_clips_of_vip_are_not_those_of_its_list(tmp_path: Path, above: str) -> None:
    root = tmp_path / above
    for name in ("videos2", "videos10"):
        write_clip(root / "Images" / name, root / "Annotations" / "Category_ids" / name)
    (root / "lists").mkdir()
    (root / "lists" / "val_videos.txt").write_text("videos10\n")
    assert [clip.name for clip in vip_clips(tmp_path)] == ["videos10"]


@pytest.mark.parametrize(("find", "site"), [(davis_clips, "davischallenge.org"), (vip_clips, "sysu-hcp.net")])
def test_a_missing_data_set_does_not_say_where_it_was_sought_and_where_to_get_it(
    tmp_path: Path, find: object, site: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        find(tmp_path / "nowhere")  # type: ignore[operator]
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert site in str(caught.value) and "Annotations" in str(caught.value)


def test_frames_are_sorted_as_text(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        save_frame(tmp_path / "clip" / f"f{number}.png")
    save_mask(tmp_path / "first.png")
    (clip,) = folder_clips(tmp_path / "clip", tmp_path / "first.png")
    assert [path.stem for path in clip.frames] == ["f1", "f2", "f10"]
    assert clip.name == "clip"
    assert clip.masks == (tmp_path / "first.png", None, None)
    assert clip.load_mask(1) is None


def test_folders_in_a_folder_are_no_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "frames" / "b", tmp_path / "masks" / "b")
    write_clip(tmp_path / "frames" / "a", tmp_path / "masks" / "a")
    (tmp_path / "masks" / "a" / "00001.png").unlink()
    clips = folder_clips(tmp_path / "frames", tmp_path / "masks")
    assert [clip.name for clip in clips] == ["a", "b"]
    assert [mask is None for mask in clips[0].masks] == [False, True, False]


def test_a_first_frame_without_mask_is_not_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "frames", tmp_path / "masks")
    (tmp_path / "masks" / "00000.png").unlink()
    with pytest.raises(DatasetError, match=r"no mask of its first frame 00000\.jpg; expected .*masks/00000\.png"):
        folder_clips(tmp_path / "frames", tmp_path / "masks")


def test_a_clip_of_the_list_without_frames_is_not_named(tmp_path: Path) -> None:
    write_davis(tmp_path)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("camel\n")
    with pytest.raises(DatasetError, match=r"clip camel: no frames in .*camel"):
        davis_clips(tmp_path)


def test_black_and_white_masks_are_all_void(tmp_path: Path) -> None:
    save_frame(tmp_path / "frames" / "0.jpg")
    save_mask(tmp_path / "masks" / "0.png", np.array([[0, 255, 0]], dtype=np.uint8), palette=False)
    (clip,) = folder_clips(tmp_path / "frames", tmp_path / "masks")
    mask = clip.load_mask(0)
    assert mask is not None and mask.tolist() == [[0, 1, 0]]
    save_mask(tmp_path / "masks" / "0.png", np.array([[0, 255, 0]], dtype=np.uint8), palette=True)
    (clip,) = folder_clips(tmp_path / "frames", tmp_path / "masks")
    mask = clip.load_mask(0)
    assert mask is not None and mask.tolist() == [[0, 255, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(18, dtype=np.uint8).reshape(2, 3, 3), "got colours"),
        (np.array([[0, 300]], dtype=np.uint16), "got 0 to 300"),
    ],
)
def test_a_picture_is_taken_for_an_index_mask(tmp_path: Path, values: np.ndarray, message: str) -> None:
    save_mask(tmp_path / "m.png", values, palette=False)
    with pytest.raises(UnreadableImageError, match=message) as caught:
        read_index_mask(tmp_path / "m.png")
    assert "m.png" in str(caught.value)


def test_a_damaged_mask_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"not a picture")
    with pytest.raises(UnreadableImageError, match=r"m\.png"):
        read_index_mask(tmp_path / "m.png")


def test_grey_values_in_three_channels_are_refused(tmp_path: Path) -> None:
    save_mask(tmp_path / "m.png", np.stack([INDICES] * 3, axis=2), palette=False)
    np.testing.assert_array_equal(read_index_mask(tmp_path / "m.png"), INDICES)


def test_an_unknown_clip_has_no_neighbour(tmp_path: Path) -> None:
    write_davis(tmp_path)
    clips = davis_clips(tmp_path)
    assert [clip.name for clip in choose_clips(clips, ["zebra", "bear"])] == ["bear", "zebra"]
    with pytest.raises(DatasetError, match=r"no clip 'zebrra' among 3; the nearest are zebra"):
        choose_clips(clips, ["zebrra"])
