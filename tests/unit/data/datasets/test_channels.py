"""Images of any channels and types: every value arrives, to the last of 16 bits."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.channels import ChannelFormat, ChannelImages, channels_as_rgb
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.mixture import Mixture


def values_of(shape: tuple[int, ...], dtype: type = np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def tensor_of(path: Path, num_channels: int, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    dataset = make_dataset(str(path.parent), ChannelFormat(num_channels, value_range))
    assert isinstance(dataset, ChannelImages) and dataset.name(0) == path.name
    return dataset.load_tensor(0)


def bits(tensor: torch.Tensor, full: int = 65535) -> np.ndarray:
    assert tensor.dtype == torch.float32 and 0 <= tensor.min() and tensor.max() <= 1
    return (tensor.double() * full).round().long().numpy()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_of_either_layout_keeps_every_value(tmp_path: Path, dtype: type, channels_last: bool) -> None:
    values = values_of((5, 9, 12), dtype)
    np.save(tmp_path / "x.npy", values.transpose(1, 2, 0) if channels_last else values)
    assert np.array_equal(bits(tensor_of(tmp_path / "x.npy", 5), np.iinfo(dtype).max), values)


@pytest.mark.parametrize("with_package", [True, False])
def test_tiff_of_several_pages_or_planes_keeps_every_value(
    tmp_path: Path, with_package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of((4, 9, 12))
    if with_package:
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(tmp_path / "x.tif", values.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    else:
        monkeypatch.setitem(sys.modules, "tifffile", None)
        first, *others = (Image.fromarray(page) for page in values)
        first.save(tmp_path / "x.tif", save_all=True, append_images=others)
    assert np.array_equal(bits(tensor_of(tmp_path / "x.tif", 4)), values)


def test_grey_of_16_bits_and_colours_of_16_bits_in_a_png(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    grey, colours = values_of((9, 12)), values_of((9, 12, 3))
    for name, values in (("grey", grey), ("colours", colours)):
        (tmp_path / name).mkdir()
        written = values if values.ndim == 2 else np.ascontiguousarray(values[:, :, ::-1])  # OpenCV's order
        cv2.imwrite(str(tmp_path / name / "x.png"), written)
    assert np.array_equal(bits(tensor_of(tmp_path / "grey" / "x.png", 1)), grey[None])
    three = tensor_of(tmp_path / "colours" / "x.png", 3, (0, 65535))
    assert np.array_equal(bits(three), colours.transpose(2, 0, 1))


def test_photographs_are_what_they_are_as_rgb(tmp_path: Path) -> None:
    for mode, count in (("RGB", 3), ("RGBA", 4), ("L", 1), ("CMYK", 4)):
        (tmp_path / mode).mkdir()
        image = Image.fromarray(values_of((9, 12, 4), np.uint8), "CMYK").convert(mode)
        path = tmp_path / mode / ("x.tif" if mode == "CMYK" else "x.png")
        image.save(path)
        expected = np.asarray(image).reshape(9, 12, count).transpose(2, 0, 1)
        assert np.array_equal(bits(tensor_of(path, count), 255), expected)


def test_values_between_the_ends_of_a_range_are_scaled_and_others_cut_off(tmp_path: Path) -> None:
    values = np.array([[[-5.0, 0.0, 50.0, 100.0, 1e9, np.nan, np.inf, -np.inf]]], np.float32)
    np.save(tmp_path / "x.npy", np.repeat(values, 8, 1))
    assert tensor_of(tmp_path / "x.npy", 1, (0, 100))[0, 0].tolist() == [0, 0, 0.5, 1, 1, 0, 1, 0]
    np.save(tmp_path / "x.npy", values_of((1, 9, 9), np.int16))
    assert tensor_of(tmp_path / "x.npy", 1, (-32768, 32767)).min() >= 0.5  # none is negative


def test_floating_point_in_0_to_1_stays_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 9, 12), np.float32)
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(tensor_of(tmp_path / "x.npy", 2).numpy(), values)


def test_large_images_are_shrunk_by_whole_numbers(tmp_path: Path) -> None:
    values = values_of((2, 64, 96))
    np.save(tmp_path / "x.npy", values)
    dataset = make_dataset(str(tmp_path), ChannelFormat(2))
    shrunk = dataset.load_tensor(0, 16)
    expected = values.reshape(2, 16, 4, 24, 4).mean((2, 4)) / 65535
    assert shrunk.shape == (2, 16, 24) and np.abs(shrunk.numpy() - expected).max() < 1e-6  # float32 sums of 16
    assert dataset.load_tensor(0, 33).shape == (2, 64, 96)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((9, 9, 4), np.uint8), r"its shape is \[9, 9, 4\]; data.in_channels=5 expects \[H, W, 5\] or"),
        (np.zeros((9, 9), np.uint8), r"its shape is \[9, 9\]"),
        (np.full((5, 9, 9), 3000.0), "lie between 0 and 3000: set data.value_range"),
        (np.full((5, 9, 9), -1, np.int16), "of type int16, lie between -1 and 0: set data.value_range"),
        (np.zeros((5, 9, 9), complex), "its values are of type complex128"),
        (np.array([{}] * 5), "Python objects"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_was_found(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    with pytest.raises(UnreadableImageError, match=rf"x\.npy: ValueError: .*{message}"):
        tensor_of(tmp_path / "x.npy", 5)


@pytest.mark.parametrize("suffix", ["npy", "tif", "png"])
def test_a_damaged_file_is_a_bad_image_wherever_it_is_cut(tmp_path: Path, suffix: str) -> None:
    values = values_of((2, 9, 12))
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, values)
    elif suffix == "tif":
        pytest.importorskip("tifffile").imwrite(path, values, photometric="minisblack")
    else:
        Image.fromarray(values[0]).save(path)
    content = path.read_bytes()
    for length in (0, 4, 7, 60, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableImageError, match=path.name):
            tensor_of(path, 1 if suffix == "png" else 2)


def test_shards_lists_and_mixtures_are_read_channel_by_channel_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = values_of((5, 9, 12))
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "list.txt").write_text("x.npy\n")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        content = (tmp_path / "x.npy").read_bytes()
        member = tarfile.TarInfo("x.npy")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    for spec in (f"{tmp_path}/*.npy", f"{tmp_path}/list.txt", f"{tmp_path}/a.tar"):
        assert np.array_equal(bits(make_dataset(spec, ChannelFormat(5)).load_tensor(0)), values)
    mixture = make_dataset(f"mix:2*{tmp_path}/a.tar + 1*{tmp_path}/list.txt", ChannelFormat(5))
    assert isinstance(mixture, Mixture) and mixture.load_tensor(2).shape == (5, 9, 12)
    assert pickle.loads(pickle.dumps(mixture)).load_tensor(2).shape == (5, 9, 12)  # as a spawned process receives it


def test_arrays_are_no_images_unless_channels_are_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values_of((5, 9, 12)))
    with pytest.raises(DatasetError, match=r"To read arrays \(.npy\), set data.in_channels"):
        make_dataset(str(tmp_path))
    with pytest.raises(DatasetError, match=r"synthetic holds photographs.*data.in_channels=5 give files"):
        make_dataset("synthetic", ChannelFormat(5))


@pytest.mark.parametrize(("count", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (5, (0, 1, 2))])
def test_people_see_the_first_three_channels_or_grey(tmp_path: Path, count: int, shown: tuple[int, ...]) -> None:
    images = torch.rand(2, count, 4, 6)
    assert torch.equal(channels_as_rgb(images), images[:, list(shown)])
    np.save(tmp_path / "x.npy", values_of((count, 9, 12), np.uint8))
    picture = make_dataset(str(tmp_path), ChannelFormat(count, (0, 255))).load(0)
    assert picture.mode == "RGB" and np.array_equal(
        np.asarray(picture).transpose(2, 0, 1), np.load(tmp_path / "x.npy")[list(shown)]
    )
