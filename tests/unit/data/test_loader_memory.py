"""Loader processes over thousands of steps: their memory stays what it is, and they stay the same processes."""

from __future__ import annotations

import io
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.tar_shards import TarShards
from dinov2_equi.data.loaders import make_train_loader
from dinov2_equi.data.masking import MaskingGenerator

STEPS, WARM_UP = 5000, 1000
MAX_MIB_PER_100_STEPS = 0.1


def jpegs(count: int) -> list[bytes]:
    """Return images of different sizes, one in eight of them damaged."""
    contents = []
    for number in range(count):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        file = io.BytesIO()
        small.resize((40 + number, 60 - number % 20), Image.Resampling.BICUBIC).save(file, "jpeg")
        contents.append(file.getvalue()[: 60 if number % 8 == 0 else None])
    return contents


def folder_of(root: Path) -> ImageDataset:
    for number, content in enumerate(jpegs(48)):
        (root / f"{number:02d}.jpg").write_bytes(content)
    return ImageFolder(root)


def shard_of(root: Path) -> ImageDataset:
    with tarfile.open(root / "0.tar", "w") as tar:
        for number, content in enumerate(jpegs(48)):
            member = tarfile.TarInfo(f"{number:02d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return TarShards(root / "0.tar")


def resident_mib(process: int | str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("make", [folder_of, shard_of])
@pytest.mark.parametrize("crop_later", [False, True])
def test_memory_grows_over_thousands_of_steps(tmp_path: Path, make: object, crop_later: bool) -> None:
    loader = make_train_loader(
        dataset=make(tmp_path),  # type: ignore[operator]
        augmentation=DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 32, 16),
        mask_generator=MaskingGenerator((4, 4)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        batch_size=4,
        num_workers=2,
        seed=0,
        start_step=0,
        num_steps=STEPS,
        crop_later=crop_later,
    )
    at_first: dict[int | str, float] = {}
    for step, _ in enumerate(loader, start=1):
        if step == WARM_UP:
            workers = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
            at_first = {process: resident_mib(process) for process in ("self", *workers)}
        if step == STEPS - 20:  # before the workers stop
            grown = {process: resident_mib(process) - before for process, before in at_first.items()}
    assert len(grown) == 3  # the same processes through all epochs
    assert max(grown.values()) < MAX_MIB_PER_100_STEPS * (STEPS - WARM_UP) / 100, grown
