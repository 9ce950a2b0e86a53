"""Sizes from headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets import pixel_sizes as module
from dinov2_equi.data.datasets.base import UnreadableImageError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.listed import ListedImages
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.pixel_sizes import header_size, pixel_sizes


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of many kinds; three are none, or claim to be too large to be one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.effect_noise((30, 20), 60).convert("RGB")
    exif = Image.Exif()
    for orientation in (1, 3, 6):
        exif[0x0112] = orientation
        for suffix in ("jpg", "png", "tif", "webp"):
            image.save(folder / f"turned{orientation}.{suffix}", exif=exif)
    image.convert("P").save(folder / "palette.bmp")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "text.jpg").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(folder / "bomb.png")
    return folder


def test_a_header_says_other_than_the_decoded_image(photos: Path) -> None:
    images = ImageFolder(photos)
    indices, sizes = pixel_sizes(images)
    assert indices == list(range(17)) and len(images) == 17
    for index in indices:
        try:
            height, width = images.load_tensor(index).shape[1:]
        except UnreadableImageError:
            height, width = 0, 0
        assert sizes[index].tolist() == [width, height], images.name(index)
    assert (sizes == 0).all(axis=1).sum() == 3


def test_pixels_are_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert header_size(photos / "turned1.png") == header_size(photos / "turned3.jpg") == (30, 20)
    assert header_size(photos / "palette.bmp") == (30, 20)


def test_headers_are_read_again_though_nothing_changed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "STORED_FROM", 17)
    read: list[Path] = []
    monkeypatch.setattr(module, "header_size", lambda file: read.append(file) or header_size(file))
    few, _ = pixel_sizes(ImageFolder(photos), 4)
    assert few == [0, 4, 8, 12] and len(read) == 4  # some of them: not stored
    _, sizes = pixel_sizes(ImageFolder(photos))
    assert len(read) == 4 + 17
    indices, again = pixel_sizes(ImageFolder(photos), 4)  # more than was asked for costs nothing
    assert len(read) == 4 + 17 and len(indices) == 17 and isinstance(again, np.memmap)
    assert np.array_equal(sizes, again)
    (photos / "text.jpg").write_bytes(b"no image, longer")
    pixel_sizes(ImageFolder(photos))
    assert len(read) == 4 + 17 + 17


def test_sizes_of_other_files_under_the_same_names_are_shown(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "STORED_FROM", 1)
    for width in (30, 50):
        folder = tmp_path / str(width) / "images"
        folder.mkdir(parents=True)
        Image.new("RGB", (width, 20)).save(folder / "x.bmp")
        monkeypatch.chdir(folder.parent)
        for spec in ("images", "images/*.bmp"):
            dataset = make_dataset(spec)
            assert isinstance(dataset, ListedImages)
            _, sizes = pixel_sizes(dataset)
            assert sizes.tolist() == [[width, 20]], spec
