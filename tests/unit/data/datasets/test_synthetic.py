"""Drawn images."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.synthetic import SyntheticImages


def test_size_is_height_then_width() -> None:
    dataset = SyntheticImages(length=2, size=(20, 33))
    assert dataset.load(0).size == (33, 20)
    assert dataset.load_tensor(0, 8).shape == (3, 20, 33)


def test_images_depend_on_seed_and_index_alone() -> None:
    def pixels(seed: int, index: int, length: int = 9) -> np.ndarray:
        return np.asarray(SyntheticImages(length, seed=seed).load(index))

    assert np.array_equal(pixels(1, 4), pixels(1, 4, length=50))
    assert not np.array_equal(pixels(1, 4), pixels(2, 4))
    assert not np.array_equal(pixels(1, 4), pixels(1, 7))


def test_targets_match_names_and_classes() -> None:
    dataset = SyntheticImages(7)
    assert dataset.targets == [0, 1, 2, 0, 1, 2, 0]
    assert [dataset.name(index).split("/")[0] for index in range(3)] == dataset.classes


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (200, 2)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    dataset = SyntheticImages(3, size)
    assert all(dataset.load_tensor(index).shape == (3, *size) for index in range(3))


def test_faulty_arguments_are_refused() -> None:
    for arguments in ({"length": 0}, {"size": (0, 4)}, {"seed": -1}):
        with pytest.raises(DatasetError):
            SyntheticImages(**arguments)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="3 images"):
        SyntheticImages(3).load(3)
