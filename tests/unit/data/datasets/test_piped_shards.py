"""Shards through a pipe, and shards that are read one after the other."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.datasets import piped_shards
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.blocks import blocks_of
from dinov2_equi.data.datasets.holdout import evenly_spread, hold_back
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.piped_shards import PipedShards
from dinov2_equi.data.datasets.readable import ReadableImages
from dinov2_equi.data.datasets.tar_shards import TarShards
from dinov2_equi.data.loaders import MultiCropDataset, make_train_loader
from dinov2_equi.data.masking import MaskingGenerator


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the user's cache and the folder for temporary files out of it.

    The latter has a short path: loader processes have sockets there, whose paths may have 107 letters.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tempfile.TemporaryDirectory() as short:
        (Path(short) / "tmp").mkdir()
        monkeypatch.setattr(piped_shards.tempfile, "gettempdir", lambda: f"{short}/tmp")
        yield Path(short)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six shards of four images each, image n of colour n and class n % 3."""
    (tmp_path / "shards").mkdir()
    for shard in range(6):
        with tarfile.open(tmp_path / "shards" / f"{shard:02d}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                file = io.BytesIO()
                Image.new("RGB", (24, 20), (number, 5 * number, 0)).save(file, "png")
                for suffix, content in (("png", file.getvalue()), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shards"


def piped(shards: Path, buffer: int = 2) -> PipedShards:
    """Return the shards through a pipe that notes each time it is run."""
    dataset = make_dataset(f"pipe:n={{00..05}}; echo $n >> {shards}/log; cat {shards}/$n.tar:buffer={buffer}")
    assert isinstance(dataset, PipedShards)
    return dataset


def runs(shards: Path) -> int:
    return len((shards / "log").read_text().split())


def colours(dataset: ImageDataset, count: int, start: int = 0, num_workers: int = 0) -> list[int]:
    plain = DataAugmentationDINO(
        (1, 1), (1, 1), 0, 8, 8, jitter_prob=0, gray_prob=0, global_blur_probs=(0, 0), solarize_prob=0
    )
    loader = make_train_loader(
        dataset=dataset,
        augmentation=plain,
        mask_generator=MaskingGenerator((4, 4)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        batch_size=4,
        num_workers=num_workers,
        seed=3,
        start_step=start,
        num_steps=count,
    )
    return [round(float(crop[0].mean()) * 255) for batch in loader for crop in batch.global_crops[:4]]


def test_images_names_and_classes_are_those_of_the_files(shards: Path) -> None:
    dataset, files = piped(shards), TarShards(shards / "*.tar")
    assert len(dataset) == 24 and dataset.targets == files.targets and dataset.classes == files.classes
    for index in (23, 0, 9):
        assert np.array_equal(dataset.load(index), files.load(index))
    assert "cat" in dataset.path(9) and dataset.path(9).endswith("009.png")


def test_a_shard_is_read_once_for_the_index_and_once_an_epoch(shards: Path) -> None:
    dataset = piped(shards)
    assert runs(shards) == 6
    assert sorted(colours(dataset, 6)) == list(range(24))
    assert runs(shards) <= 12
    again = piped(shards)
    assert runs(shards) <= 12 and len(again) == 24  # the index is there


@pytest.mark.parametrize("count", [3, 8, 11, 18])
def test_a_few_images_for_a_measurement_cost_every_shard_each_time(shards: Path, count: int) -> None:
    kept, _ = hold_back(piped(shards), 0.25, 0)
    few = evenly_spread(ReadableImages(kept), count)
    blocks = blocks_of(kept)
    assert blocks is not None and len(few) == count and len(kept) == 18
    before = runs(shards)
    for _ in range(2):
        for index in range(count):
            few.load(index)
    numbers = [int(few.name(index).rpartition("/")[2].removesuffix(".png")) for index in range(count)]
    used = {number // 4 for number in numbers}
    assert sorted(set(numbers)) == numbers
    assert len(used) == 2 or blocks.lengths[sorted(used)].sum() - blocks.lengths[list(used)].max() < count
    assert len(used) > 5 or runs(shards) - before <= len(used)  # more do not fit the disk at once


def test_no_more_shards_lie_on_the_disk_than_two_windows_and_one(shards: Path, places: Path) -> None:
    colours(piped(shards, buffer=1), 12)
    assert len(list((places / "tmp").rglob("*.tar"))) <= 3


@pytest.mark.parametrize("through_a_pipe", [True, False])
def test_processes_or_a_resume_change_the_order(shards: Path, through_a_pipe: bool) -> None:
    dataset = piped(shards) if through_a_pipe else make_dataset(f"tar:path={shards}/*.tar:buffer=2")
    whole = colours(dataset, 12)
    assert whole[:24] != whole[24:] and sorted(whole[:24]) == sorted(whole[24:]) == list(range(24))
    assert colours(dataset, 12, num_workers=2) == whole
    assert colours(dataset, 5, start=7) == whole[28:]
    windows = [{colour // 4 for colour in whole[start : start + 8]} for start in range(0, 24, 8)]
    assert [len(window) for window in windows] == [2, 2, 2]  # two shards at a time


def test_a_resume_reads_the_shards_of_one_window(shards: Path, places: Path) -> None:
    dataset = piped(shards)
    for file in (places / "tmp").rglob("*.tar"):
        file.unlink()
    before = runs(shards)
    colours(dataset, 1, start=4)
    assert runs(shards) - before <= 2


def test_held_back_images_leave_the_rest_in_its_blocks(shards: Path) -> None:
    train, holdout = hold_back(make_dataset(f"tar:path={shards}/*.tar:buffer=2"), 0.25, seed=0)
    blocks = blocks_of(train)
    assert blocks is not None and blocks.buffer == 2 and blocks.lengths.sum() == len(train) == 18
    seen = {
        round(float(MultiCropDataset(train, DataAugmentationDINO((1, 1), (1, 1), 0, 8, 8), 0).load(p)[0][0, 0, 0]))
        for p in range(18)
    }
    held = {int(np.asarray(holdout.load(index))[0, 0, 0]) for index in range(6)}
    assert len(seen) == 18 and seen.isdisjoint(held)


def test_faults_of_a_command_are_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piped_shards.time, "sleep", lambda seconds: None)
    with pytest.raises(DatasetError, match=r"cat /not/0\.tar' ended with exit code 1: .*No such file"):
        make_dataset("pipe:cat /not/{0..3}.tar")
    with pytest.raises(DatasetError, match="no whole uncompressed tar file"):
        make_dataset("pipe:echo no tar at all")
    with pytest.raises(DatasetError, match="expected a command"):
        make_dataset("pipe: ")
    with pytest.raises(DatasetError, match="buffer must be a whole number; got 'two'"):
        make_dataset("pipe:cat x.tar:buffer=two")
    with pytest.raises(DatasetError, match="cannot be part of a mixture"):
        make_dataset(f"mix:tar:path={shards}/*.tar:buffer=2 + synthetic")


def test_a_shard_that_changed_since_it_was_indexed_is_refused(shards: Path, places: Path) -> None:
    dataset = make_dataset(f"pipe:cat {shards}/{{00..05}}.tar")
    for file in (places / "tmp").rglob("*.tar"):
        file.unlink()
    with (shards / "02.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DatasetError, match="the shard has changed"):
        dataset.load(9)


def test_a_shard_that_changed_is_indexed_as_it_was_before(shards: Path, tmp_path: Path, places: Path) -> None:
    assert len(piped(shards)) == 24
    (shards / "02.tar").write_bytes((shards / "03.tar").read_bytes() + (bytes(10240)))
    with tarfile.open(shards / "02.tar", "a") as tar:
        tar.add(shards / "log", "more.png")
    for file in (places / "tmp").rglob("*.tar"):
        os.utime(file, (0, 0))  # of a run long ago
    shutil.rmtree(tmp_path / "cache")  # as the message says
    assert len(piped(shards)) == 25


def test_a_killed_process_leaves_half_a_shard_for_ever(shards: Path, places: Path) -> None:
    piped(shards)
    (folder,) = (places / "tmp").glob("*/*")
    (folder / "000002.tmp").write_bytes(b"half a shard")
    (folder / "000002.tar").unlink()
    assert len(colours(piped(shards), 6)) == 24
    assert not list(folder.glob("*.tmp"))
