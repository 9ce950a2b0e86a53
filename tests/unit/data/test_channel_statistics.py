"""Mean and standard deviation of the channels of a whole data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.channel_statistics import ChannelStatistics, channel_statistics
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.make import make_dataset


def last(dataset: ImageDataset, num_workers: int = 0) -> ChannelStatistics:
    return list(channel_statistics(dataset, range(len(dataset)), num_workers=num_workers))[-1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_numbers_are_those_of_all_pixels_together(tmp_path: Path, num_workers: int) -> None:
    arrays = []
    for number in range(5):  # images of other sizes and levels: a mean of means would be another number
        rng = np.random.default_rng(number)
        arrays.append(rng.random((5, 9 + 7 * number, 11)) * 2**14 + 2000 * number * np.arange(5)[:, None, None])
        np.save(tmp_path / f"{number}.npy", arrays[-1].astype(np.uint16))
    found = last(make_dataset(str(tmp_path), ChannelFormat(5)), num_workers)
    pixels = np.concatenate([array.astype(np.uint16).reshape(5, -1) for array in arrays], axis=1) / 65535
    assert (found.num_images, found.num_pixels) == (5, pixels.shape[1])
    # The images themselves are float32, 7 digits.
    assert np.allclose(found.mean, pixels.mean(1), rtol=1e-7) and np.allclose(found.std, pixels.std(1), rtol=1e-6)


def test_tiny_deviations_around_a_large_mean_are_not_lost() -> None:
    class Nearly(list[torch.Tensor]):
        def load_tensor(self, index: int) -> torch.Tensor:
            return self[index]

    values = [
        0.999 + 1e-6 * torch.rand(1, 50, 50, generator=torch.Generator().manual_seed(n)).double() for n in range(9)
    ]
    found = last(Nearly(values))  # type: ignore[arg-type]
    assert found.std[0] == pytest.approx(float(torch.stack(values).std(correction=0)), rel=1e-6)


def test_photographs_are_measured_in_0_to_1_and_bad_ones_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    Image.new("RGB", (4, 12), (0, 0, 51)).save(tmp_path / "c.png")
    found = last(make_dataset(str(tmp_path)))
    assert np.allclose(found.mean, (0.25, 0, 0.2)) and np.allclose(found.std, (np.sqrt(3) / 4, 0, 0))
    assert found.num_images == 2 and len(found.bad) == 1 and "b.png" in found.bad[0]


def test_images_of_different_channels_are_refused() -> None:
    class Mixed(list[torch.Tensor]):
        def load_tensor(self, index: int) -> torch.Tensor:
            return self[index]

    with pytest.raises(DatasetError, match="images of 3 and of 5 channels"):
        last(Mixed([torch.rand(3, 4, 4), torch.rand(5, 4, 4)]))  # type: ignore[arg-type]
