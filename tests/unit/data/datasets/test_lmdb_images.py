"""Images in an LMDB file."""

from __future__ import annotations

import io
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets import lmdb_images
from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.lmdb_images import LmdbImages
from dinov2_equi.data.datasets.make import make_dataset

lmdb = pytest.importorskip("lmdb")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def write(path: Path, values: dict[bytes, bytes], *, subdir: bool = True) -> Path:
    with lmdb.open(str(path), subdir=subdir, map_size=2**24) as environment, environment.begin(write=True) as change:
        for key, value in values.items():
            change.put(key, value)
    return path


def test_images_names_and_classes_in_the_order_of_the_keys(tmp_path: Path) -> None:
    values = {b"b.png": png(1), b"a.jpg": png(0), b"c": png(2), b"b.cls": b"7", b"a.cls": b"3\n", b"c.cls": b"7"}
    folder = write(tmp_path / "db", values | {b"__len__": b"\x80\x04K\x03.", b"__keys__": b"cos\nsystem\n"})
    for spec in (str(folder), f"lmdb:path={folder / 'data.mdb'}"):
        dataset = make_dataset(spec)
        assert isinstance(dataset, LmdbImages) and [dataset.name(index) for index in range(3)] == [
            "a.jpg",
            "b.png",
            "c",
        ]
        assert dataset.targets == [0, 1, 1] and dataset.classes == ["3", "7"]
        for index in (2, 0, 1):
            expected = np.asarray(Image.open(io.BytesIO(png(index))))
            assert np.array_equal(dataset.load(index), expected)
            assert np.array_equal(dataset.load_tensor(index).permute(1, 2, 0).numpy(), expected)


def test_one_key_without_a_class_takes_all_classes_away_and_a_single_file_will_do(tmp_path: Path) -> None:
    dataset = LmdbImages(write(tmp_path / "x.lmdb", {b"0": png(0), b"0.cls": b"1", b"1": png(1)}, subdir=False))
    assert len(dataset) == 2 and dataset.targets is None and dataset.classes == []


def test_keys_are_listed_once_and_anew_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "db", {b"0": png(0)})
    assert len(LmdbImages(folder)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(LmdbImages, "_scan", lambda self: pytest.fail("listed again without need"))
        assert len(LmdbImages(folder)) == 1
    _, environment = lmdb_images._environments.pop(folder / "data.mdb")
    environment.close()
    write(folder, {b"1": png(1)})
    assert len(LmdbImages(folder)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_process_reads_what_its_parent_has_opened(tmp_path: Path) -> None:
    dataset = LmdbImages(write(tmp_path / "db", {b"0": png(0), b"1": png(1)}))
    dataset.load(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(dataset.load, (1,)), dataset.load(1))


def test_faults_say_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = LmdbImages(write(tmp_path / "db", {b"0": png(0), b"1": b"no image"}))
    with pytest.raises(UnreadableImageError, match=r"data\.mdb/1: UnidentifiedImageError"):
        dataset.load_tensor(1)
    (tmp_path / "text.mdb").write_text("no LMDB file" * 1000)
    write(tmp_path / "empty", {b"__len__": b"0"})
    write(tmp_path / "label", {b"0": png(0), b"0.cls": b"dog"})
    for name, message in (
        ("none", "no LMDB file at .*none: expected a folder with data.mdb"),
        ("text.mdb", "is no LMDB file that can be read"),
        ("empty", "holds no key of an image"),
        ("label", r"b'0\.cls' in .* should hold a class number >= 0; got b'dog'"),
    ):
        with pytest.raises(DatasetError, match=message):
            make_dataset(f"lmdb:path={tmp_path / name}")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    write_nothing = tmp_path / "other"
    write_nothing.mkdir()
    (write_nothing / "data.mdb").write_bytes(b"")
    with pytest.raises(DatasetError, match="needs the package lmdb: pip install lmdb"):
        LmdbImages(write_nothing)
