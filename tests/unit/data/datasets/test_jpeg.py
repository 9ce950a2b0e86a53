"""Common JPEGs decoded fast: the pixels of Pillow, or left to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets import jpeg
from dinov2_equi.data.datasets.base import UnreadableImageError, image_to_tensor
from dinov2_equi.data.datasets.decode import MAX_PIXELS, decode_tensor, read_rgb
from dinov2_equi.data.datasets.sample_photos import SamplePhotos

ORIENTATION = 0x0112

pytest.importorskip("simplejpeg")


def read_tensor(path: Path, min_short_side: int | None = None) -> torch.Tensor:
    return decode_tensor(path, str(path), min_short_side)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (201, 150), **options: object) -> bytes:
    image = SamplePhotos(split="TRAIN", regions=1).load(0).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 90}),
        ("RGB", {"quality": 60, "subsampling": 0}),
        ("RGB", {"quality": 75, "subsampling": 1, "progressive": True}),
        ("L", {}),
    ],
)
@pytest.mark.parametrize("min_short_side", [None, 149, 75, 74, 37, 30, 18])
def test_pixels_are_pillows_to_the_last_bit(
    tmp_path: Path, mode: str, options: dict[str, object], min_short_side: int | None
) -> None:
    content = save(tmp_path / "x.jpg", mode, **options)
    pixels = jpeg.decode_common_jpeg(content, min_short_side, MAX_PIXELS)
    assert pixels is not None
    assert np.array_equal(pixels, np.asarray(read_rgb(tmp_path / "x.jpg", min_short_side)))


@pytest.mark.parametrize("size", [(8, 8), (17, 9), (9, 300), (1, 1), (333, 500)])
def test_sizes_of_all_kinds(tmp_path: Path, size: tuple[int, int]) -> None:
    save(tmp_path / "x.jpg", size=size)
    for side in (None, 1, 3, 8, 60, 250):
        expected = image_to_tensor(read_rgb(tmp_path / "x.jpg", side))
        assert torch.equal(read_tensor(tmp_path / "x.jpg", side), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_turned_images_are_left_to_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = save(tmp_path / "x.jpg", exif=exif)
    assert (jpeg.decode_common_jpeg(content, None, MAX_PIXELS) is None) == (orientation != 1)
    assert torch.equal(read_tensor(tmp_path / "x.jpg"), image_to_tensor(read_rgb(tmp_path / "x.jpg")))


def test_what_is_uncommon_is_left_to_pillow(tmp_path: Path) -> None:
    content = save(tmp_path / "x.jpg")
    assert jpeg.decode_common_jpeg(content, None, 201 * 150 - 1) is None  # too large
    assert jpeg.decode_common_jpeg(content, 9, MAX_PIXELS) is None  # even 1/8 is twice as large as needed
    assert jpeg.decode_common_jpeg(content[:-400], None, MAX_PIXELS) is None
    assert jpeg.decode_common_jpeg(content + b"xmp tiff:Orientation", None, MAX_PIXELS) is None
    assert jpeg.decode_common_jpeg(save(tmp_path / "cmyk.jpg", "CMYK"), None, MAX_PIXELS) is None
    assert jpeg.decode_common_jpeg(save(tmp_path / "x.png"), None, MAX_PIXELS) is None


def test_damage_is_named_by_the_slow_way(tmp_path: Path) -> None:
    content = save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(content[:-400])
    with pytest.raises(UnreadableImageError, match=r"x\.jpg.*truncated"):
        read_tensor(tmp_path / "x.jpg")
    with pytest.raises(UnreadableImageError, match=r"none\.jpg"):
        read_tensor(tmp_path / "none.jpg")


def test_without_the_library_the_same_pixels_come_from_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.jpg")
    fast = read_tensor(tmp_path / "x.jpg", 75)
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    assert torch.equal(read_tensor(tmp_path / "x.jpg", 75), fast)
