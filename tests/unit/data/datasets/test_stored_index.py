"""Folders and lists are searched once, and again when something changed."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets import folder, listed
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.listed import ListedImages, read_list, read_table
from dinov2_equi.data.samplers import SampleOrder

HOUR_NS = 3600 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store what is found however little it is, and not in the user's cache."""
    for module in (folder, listed):
        monkeypatch.setattr(module, "STORED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dinov2_equi" / "index"


def settle(root: Path, hours: int = 1) -> None:
    """Make all folders look as if they had changed that long ago."""
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        long_ago = path.stat().st_mtime_ns - hours * HOUR_NS
        os.utime(path, ns=(long_ago, long_ago))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("dog/2.png", "cat/deep/1.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(tmp_path / "photos" / name)
    settle(tmp_path / "photos")
    return tmp_path / "photos"


def facts(dataset: ListedImages) -> tuple[list[str], list[int] | None, list[str]]:
    return [dataset.name(index) for index in range(len(dataset))], dataset.targets, dataset.classes


def no_search(*arguments: object) -> None:
    pytest.fail("searched again without need")


def test_a_folder_is_searched_once_and_mapped_from_then_on(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageFolder(photos)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(folder, "_scan", no_search)
    again = ImageFolder(photos)
    assert facts(first) == facts(again) == (["cat/deep/1.png", "dog/1.png", "dog/2.png"], [0, 1, 1], ["cat", "dog"])
    assert again.num_bytes.tolist() == [(photos / again.name(index)).stat().st_size for index in range(3)]
    assert again.class_numbers is not None
    for values in (again.paths.text, again.paths.ends, again.class_numbers, again.num_bytes):
        assert isinstance(values, np.memmap)
    assert again.paths.ends.itemsize + again.class_numbers.itemsize + again.num_bytes.itemsize == 16


@pytest.mark.parametrize("nested", [False, True])
def test_a_new_or_deleted_image_is_noticed_at_any_depth(photos: Path, nested: bool) -> None:
    assert len(ImageFolder(photos)) == 3
    place = photos / "cat" / "deep" if nested else photos / "dog"
    Image.new("RGB", (6, 4)).save(place / "9.png")
    assert len(ImageFolder(photos)) == 4  # nothing is stored: the folder has just changed
    settle(photos)
    assert len(ImageFolder(photos)) == 4
    (place / "9.png").unlink()
    assert len(ImageFolder(photos)) == 3


def test_a_new_folder_a_renamed_one_and_a_lost_one_are_noticed(photos: Path) -> None:
    ImageFolder(photos)
    (photos / "cat").rename(photos / "cow")
    assert ImageFolder(photos).classes == ["cow", "dog"]
    settle(photos)
    ImageFolder(photos)
    (photos / "cow" / "deep" / "1.png").unlink()
    (photos / "cow" / "deep").rmdir()
    assert len(ImageFolder(photos)) == 2


def test_nothing_is_stored_of_a_folder_that_changes_right_now_nor_of_a_small_one(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "dog" / "note.txt").write_text("just now")
    ImageFolder(photos)
    settle(photos)
    monkeypatch.setattr(folder, "STORED_FROM", 4)
    ImageFolder(photos)
    assert not cache.exists()


def test_a_flat_folder_and_other_suffixes_have_indices_of_their_own(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    for name in ("a.png", "b.npy"):
        (root / name).write_bytes(b"")
    settle(root)
    for _ in range(2):
        assert facts(ImageFolder(root)) == (["a.png"], None, [])
        assert facts(ImageFolder(root, (".npy",))) == (["b.npy"], None, [])
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_index_is_written_anew(photos: Path, cache: Path) -> None:
    ImageFolder(photos)
    (place,) = cache.iterdir()
    for damage in (lambda file: file.write_bytes(b"nothing"), Path.unlink, lambda file: np.save(file, np.zeros(1))):
        damage(place / "bytes.npy")
        assert len(ImageFolder(photos)) == 3
    assert [path.name for path in cache.iterdir()] == [place.name]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_lists_and_tables_are_read_once_and_again_when_they_change(
    photos: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = photos / f"list.{kind}"
    read = read_list if kind == "txt" else read_table
    lines = ["dog/1.png", "cat/deep/1.png"] if kind == "txt" else ["path,label", "dog/1.png,b", "cat/deep/1.png,a"]
    file.write_text("\n".join(lines))
    expected = facts(read(file))
    assert expected[1] == (None if kind == "txt" else [1, 0])
    with monkeypatch.context() as patch:
        patch.setattr(listed, "_read_lines", no_search)
        patch.setattr(listed, "_read_csv", no_search)
        again = read(file)
        assert facts(again) == expected and isinstance(again.paths.text, np.memmap)
    file.write_text("\n".join([*lines, lines[-1]]))
    assert len(read(file)) == 3


def measure(file: Path, root: Path, answer: Connection) -> None:
    """Send how many bytes of memory of its own a process needs to open a list and to look up names in any order."""

    def private_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    before = private_kib()
    dataset = read_list(file, root)
    order = SampleOrder(len(dataset), 0)
    for position in range(2000):
        dataset.name(order.index(position))
    answer.send((private_kib() - before) * 1024)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_a_process_needs_16_bytes_of_memory_an_image_or_more(photos: Path) -> None:
    count = 500_000
    (photos / "list.txt").write_text("dog/1.png\n" * count)
    read_list(photos / "list.txt")
    receiving, sending = multiprocessing.Pipe()
    arguments = (photos / "list.txt", photos, sending)
    process = multiprocessing.get_context("fork").Process(target=measure, args=arguments)
    process.start()
    assert receiving.recv() / count < 16  # about 2: what does not grow with the number of images
    process.join()
