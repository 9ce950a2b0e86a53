"""Files of every kind become upright 8-bit RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.decode import read_rgb, to_rgb

EXIF_ORIENTATION = 0x0112


def rgb_values(path: Path) -> np.ndarray:
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def left_red_right_blue(height: int = 16, width: int = 24) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_grey_file_gives_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (rgb_values(tmp_path / "grey.png") == grey[:, :, None]).all()


def test_palette_file_gives_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png")
    assert rgb_values(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert rgb_values(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparent_colour_of_an_rgb_png_is_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    assert rgb_values(tmp_path / "keyed.png").tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_alpha_is_laid_over_white_and_not_over_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (0, 100, 200, 255))
    image.putpixel((1, 0), (0, 100, 200, 0))
    image.putpixel((2, 0), (0, 100, 200, 128))
    image.save(tmp_path / "alpha.png")
    opaque, transparent, half = rgb_values(tmp_path / "alpha.png")[0]
    assert opaque.tolist() == [0, 100, 200]
    assert transparent.tolist() == [255, 255, 255]
    blended = np.array([0, 100, 200]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(half - blended).max() <= 1  # 8-bit rounding of the blend


def test_grey_with_alpha_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    image.save(tmp_path / "la.png")
    assert rgb_values(tmp_path / "la.png").tolist() == [[[40] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped_to_white(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    assert rgb_values(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_big_endian_16_bit_grey_is_scaled() -> None:
    image = Image.frombytes("I;16B", (2, 1), np.array([[257, 65535]], ">u2").tobytes())
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [1, 255]


def test_32_bit_integers_count_as_16_bit_and_are_clipped() -> None:
    image = Image.fromarray(np.array([[-5, 257, 65535, 1 << 20]], np.int32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 128.0, 300.0], [0, 128, 255])]
)
def test_floating_point_grey_of_both_ranges(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tif")
    assert rgb_values(tmp_path / "float.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_file_is_not_inverted(tmp_path: Path, suffix: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    image.save(tmp_path / f"cmyk.{suffix}", quality=100) if suffix == "jpg" else image.save(tmp_path / "cmyk.tif")
    red = rgb_values(tmp_path / f"cmyk.{suffix}")[8, 8]
    assert red[0] > 245 and red[1] < 10 and red[2] < 10


def test_black_and_white_file(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert rgb_values(tmp_path / "bits.png").tolist() == [[[255] * 3, [0] * 3]]


# What a viewer must do with the stored pixels for each EXIF orientation.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    assert (rgb_values(tmp_path / "turned.png") == UPRIGHT[orientation](stored)).all()


def test_exif_rotated_jpeg_decoded_at_a_fraction_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # stored left is the viewer's top
    left_red_right_blue(128, 192).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = np.asarray(read_rgb(tmp_path / "turned.jpg", min_short_side=64))
    assert image.shape == (96, 64, 3)
    assert image[8, 32, 0] > 240 and image[-8, 32, 2] > 240


@pytest.mark.parametrize(("min_short_side", "expected"), [(None, 128), (65, 128), (64, 64), (33, 64), (16, 16), (1, 1)])
def test_jpeg_is_never_decoded_smaller_than_asked(tmp_path: Path, min_short_side: int | None, expected: int) -> None:
    left_red_right_blue(128, 192).save(tmp_path / "large.jpg")
    assert min(read_rgb(tmp_path / "large.jpg", min_short_side).size) == expected


def test_jpeg_decoded_at_a_fraction_shows_the_same_picture(tmp_path: Path) -> None:
    left_red_right_blue(128, 192).save(tmp_path / "large.jpg", quality=95)
    small = read_rgb(tmp_path / "large.jpg", min_short_side=64)
    full = read_rgb(tmp_path / "large.jpg").resize(small.size, Image.Resampling.BOX)
    # Mean over the picture: the two differ at the edge between the colours alone.
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full).astype(int)).mean() < 2


@pytest.mark.parametrize(("min_short_side", "expected"), [(None, 128), (65, 128), (64, 64), (50, 64), (30, 32)])
def test_file_of_another_kind_is_shrunk_by_a_whole_number(
    tmp_path: Path, min_short_side: int | None, expected: int
) -> None:
    # Beside a large PNG every image of a batch would be padded to its size.
    left_red_right_blue(128, 192).save(tmp_path / "large.png")
    image = read_rgb(tmp_path / "large.png", min_short_side)
    assert image.size == (expected * 3 // 2, expected)
    assert image.getpixel((2, 2)) == (255, 0, 0) and image.getpixel((expected, 2)) == (0, 0, 255)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut off.jpg"
    left_red_right_blue(128, 192).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableImageError, match=r"cut off\.jpg.*truncated"):
        read_rgb(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"])
def test_file_that_is_no_image_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"text\.{suffix}"):
        read_rgb(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on damaged TIFF tags
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_damaged_bytes_give_an_image_or_the_named_error_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    left_red_right_blue().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = int(rng.integers(0, 256))
        path.write_bytes(bytes(damaged))
        try:
            assert read_rgb(path).mode == "RGB"
        except UnreadableImageError as error:
            assert path.name in str(error)
