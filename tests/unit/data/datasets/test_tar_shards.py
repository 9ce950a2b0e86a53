"""Images in tar shards: the same as in files, in any order, through an index written once."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets import stored_index, tar_shards
from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.stored_index import INDEX_FOLDER, Arrays
from dinov2_equi.data.datasets.tar_shards import ENTRY, TarShards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images each, image n of seed n and class n % 3 + 5."""
    for shard in range(3):
        files = {}
        for number in range(4 * shard, 4 * shard + 4):
            files[f"part/{number:04d}.cls"] = str(number % 3 + 5).encode()
            files[f"part/{number:04d}.json"] = b"{}"
            files[f"part/{number:04d}.png"] = png(number)
        write_shard(tmp_path / "shards" / f"train-{shard:03d}.tar", files)
    return tmp_path / "shards"


def pixels(dataset: TarShards, index: int) -> np.ndarray:
    image = np.asarray(dataset.load(index))
    assert np.array_equal(image, dataset.load_tensor(index).permute(1, 2, 0).numpy())
    return image


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000..002}.tar"])
def test_images_names_and_classes_in_any_order(shards: Path, pattern: str) -> None:
    dataset = make_dataset(f"tar:path={shards / pattern}")
    assert isinstance(dataset, TarShards) and len(dataset) == 12
    for index in (11, 0, 5, 4):
        expected = np.asarray(Image.open(io.BytesIO(png(index))))
        assert np.array_equal(pixels(dataset, index), expected)
    assert dataset.name(5) == "train-001.tar/part/0005.png"
    assert dataset.classes == ["5", "6", "7"] and dataset.targets == [index % 3 for index in range(12)]
    with pytest.raises(IndexError, match="the shards holds? 12 images"):
        dataset.load(12)


def test_a_path_alone_names_a_shard(shards: Path) -> None:
    assert len(make_dataset(str(shards / "train-000.tar"))) == 4


def test_a_class_after_its_image_counts_as_well_and_one_without_takes_all_away(tmp_path: Path) -> None:
    after = write_shard(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"2\n", "1.png": png(1), "1.cls": b"0"})
    assert TarShards(after).targets == [1, 0]
    without = write_shard(tmp_path / "b.tar", {"0.png": png(0), "0.cls": b"2", "1.png": png(1)})
    assert TarShards(without).targets is None and TarShards(without).classes == []


def test_index_is_written_once_and_again_when_a_shard_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = str(shards / "*.tar")
    TarShards(pattern)
    assert len(list((shards / INDEX_FOLDER).iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_scan", lambda *arguments: pytest.fail("read again without need"))
        assert len(TarShards(pattern)) == 12
    write_shard(shards / "train-002.tar", {"x.png": png(1), "y.png": png(2)})
    assert len(TarShards(pattern)) == 10


def test_damaged_index_is_written_anew(shards: Path) -> None:
    TarShards(str(shards / "*.tar"))
    (folder,) = (shards / INDEX_FOLDER).iterdir()
    for damage in (lambda file: file.write_bytes(b"nothing"), Path.unlink, lambda file: np.save(file, np.zeros(3))):
        damage(folder / "entries.npy")
        assert len(TarShards(str(shards / "*.tar"))) == 12
    assert not [path for path in (shards / INDEX_FOLDER).iterdir() if path.name.startswith(".")]


def test_index_goes_to_the_cache_where_the_folder_cannot_be_written_to(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = stored_index._save

    def refuse(arrays: Arrays, place: Path) -> None:  # the tests may run as root, who may write anywhere
        if INDEX_FOLDER in place.parts:
            raise PermissionError(place)
        save(arrays, place)

    monkeypatch.setattr(stored_index, "_save", refuse)
    assert len(TarShards(str(shards / "*.tar"))) == 12
    assert not (shards / INDEX_FOLDER).exists() and len(list((cache / "dinov2_equi" / "index").iterdir())) == 1


def test_index_takes_16_bytes_an_entry_and_stays_on_the_disk(shards: Path) -> None:
    index = TarShards(str(shards / "*.tar"))._index
    assert ENTRY.itemsize == 16
    for values in (index.entries, index.names.text, index.names.ends, index.labels):
        assert isinstance(values, np.memmap)


def test_bad_image_in_a_shard_is_named(tmp_path: Path) -> None:
    dataset = TarShards(write_shard(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1)[:-40]}))
    with pytest.raises(UnreadableImageError, match=r"a\.tar/1\.png"):
        dataset.load_tensor(1)
    os.truncate(tmp_path / "a.tar", 100)  # after the index was written
    with pytest.raises(UnreadableImageError, match=r"a\.tar/0\.png"):
        dataset.load_tensor(0)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UnreadableImageError, match=r"a\.tar/0\.png"):
        dataset.load_tensor(0)


def test_faults_say_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", {"0.png": png(0), "1.png": png(1)})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:600])
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    write_shard(tmp_path / "texts.tar", {"0.txt": b"x"})
    write_shard(tmp_path / "label.tar", {"0.png": png(0), "0.cls": b"dog"})
    for name, message in (
        ("none.tar", r"no such shard: .*none\.tar"),
        ("none-*.tar", "no such shard.*Give the path of a tar file, a pattern"),
        ("x-{00..03}.tar", r"no such shard: .*x-00\.tar"),
        ("cut.tar", r"cut\.tar is cut off within 0\.png. Copy it again"),
        ("text.tar", r"text\.tar is no whole uncompressed tar"),
        ("a.tar.gz", "is compressed.*Unpack it"),
        ("texts.tar", "no image"),
        ("label.tar", r"0\.cls in the shard .* should hold a whole number; got b'dog'"),
    ):
        with pytest.raises(DatasetError, match=message):
            make_dataset(str(tmp_path / name))
    with pytest.raises(DatasetError, match=r"no such shard: .*\(0 others were found\)"):
        make_dataset(f"tar:path={tmp_path}")  # the folder of the shards


def test_image_net_22k_has_a_shard_for_each_class(tmp_path: Path) -> None:
    for number, name in enumerate(("n02", "n01", "n10")):
        files = {f"{name}_{10 * number + image}.JPEG": png(10 * number + image) for image in range(number + 1)}
        write_shard(tmp_path / "whole" / f"{name}.tar", files)
    dataset = make_dataset(f"ImageNet22k:root={tmp_path / 'whole'}:extra=/not/read")
    assert dataset.classes == ["n01", "n02", "n10"] and dataset.targets == [0, 0, 1, 2, 2, 2]
    assert dataset.name(2) == "n02.tar/n02_0.JPEG"
    assert np.array_equal(dataset.load(4), Image.open(io.BytesIO(png(21))))
    with pytest.raises(DatasetError, match=r"<class>\.tar, such as n01440764\.tar, in .*/none"):
        make_dataset(f"ImageNet22k:root={tmp_path / 'none'}")
