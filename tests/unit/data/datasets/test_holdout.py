"""Splitting off a part that is not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.holdout import Subset, split_holdout
from dinov2_equi.data.datasets.synthetic import SyntheticImages


class WithTargets(SyntheticImages):
    """Synthetic images with the classes that a test wants."""

    def __init__(self, targets: list[int] | None, length: int | None = None) -> None:
        super().__init__(length if targets is None else len(targets), size=(4, 5))  # type: ignore[arg-type]
        self._targets = targets

    @property
    def targets(self) -> list[int] | None:  # type: ignore[override]
        return self._targets


def indices(subset: Subset) -> list[int]:
    return [int(index) for index in subset.indices]


@pytest.mark.parametrize("length", [2, 3, 10, 101])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("has_targets", [True, False])
def test_parts_are_disjoint_complete_and_never_empty(length: int, fraction: float, has_targets: bool) -> None:
    dataset = WithTargets([index % 3 for index in range(length)] if has_targets else None, length)
    train, holdout = split_holdout(dataset, fraction, seed=0)
    assert sorted(indices(train) + indices(holdout)) == list(range(length))
    assert len(holdout) == min(max(round(fraction * length), 1), length - 1)
    assert indices(train) == sorted(indices(train)) and indices(holdout) == sorted(indices(holdout))


def test_each_class_is_held_back_in_proportion() -> None:
    targets = [0] * 100 + [1] * 60 + [2] * 40
    train, holdout = split_holdout(WithTargets(targets), 0.1, seed=3)
    assert np.bincount(holdout.targets or []).tolist() == [10, 6, 4]
    assert np.bincount(train.targets or []).tolist() == [90, 54, 36]


def test_held_back_images_are_spread_over_a_sorted_data_set() -> None:
    _, holdout = split_holdout(WithTargets(None, 1000), 0.1, seed=0)
    assert 300 < np.mean(indices(holdout)) < 700  # the mean of 100 uniform draws lies within 500 +- 7 sigma


def test_split_is_a_function_of_the_seed() -> None:
    dataset = WithTargets(None, 50)
    assert indices(split_holdout(dataset, 0.2, 1)[1]) == indices(split_holdout(dataset, 0.2, 1)[1])
    assert indices(split_holdout(dataset, 0.2, 1)[1]) != indices(split_holdout(dataset, 0.2, 2)[1])


def test_subset_shows_the_images_of_its_indices() -> None:
    dataset: ImageDataset = SyntheticImages(9, size=(6, 7))
    subset = Subset(dataset, [4, 2])
    assert len(subset) == 2
    assert subset.name(0) == dataset.name(4)
    assert subset.targets == [1, 2]
    assert subset.classes == dataset.classes
    assert torch.equal(subset.load_tensor(1, 3), dataset.load_tensor(2))
    assert np.array_equal(np.asarray(subset.load(1)), np.asarray(dataset.load(2)))
    with pytest.raises(IndexError, match="2 images"):
        subset.load(2)
    with pytest.raises(IndexError, match="9 images"):
        Subset(dataset, [0, 9])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_faulty_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(DatasetError, match="between 0 and 1"):
        split_holdout(WithTargets(None, 5), fraction, 0)


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match="at least 2"):
        split_holdout(WithTargets(None, 1), 0.5, 0)
