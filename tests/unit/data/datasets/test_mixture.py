"""Several data sets as one, with the shares that were asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.holdout import hold_back
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.mixture import Mixture
from dinov2_equi.data.datasets.synthetic import SyntheticImages


def write(root: Path, count: int, classes: str = "") -> ImageFolder:
    for number in range(count):
        path = root / (classes[number % len(classes)] if classes else "") / f"{root.name}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    return ImageFolder(root)


def names(dataset: Mixture) -> list[str]:
    return [Path(dataset.name(index)).name for index in range(len(dataset))]


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, (8, 4)), ((1, 1), (8, 8)), ((3, 1), (12, 4)), ((0.2, 0.8), (8, 32))]
)
def test_shares_are_those_of_the_weights_and_every_image_is_there(
    tmp_path: Path, weights: tuple[float, float] | None, expected: tuple[int, int]
) -> None:
    mixture = Mixture([write(tmp_path / "a", 8), write(tmp_path / "b", 4)], weights)
    counts = Counter(names(mixture))
    assert len(mixture) == sum(expected) and len(counts) == 12
    for letter, total in zip("ab", expected, strict=True):
        of_part = [count for name, count in counts.items() if name.startswith(letter)]
        assert sum(of_part) == total and max(of_part) - min(of_part) <= 1


def test_images_and_classes_are_those_of_the_parts(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", 4, "xy"), write(tmp_path / "b", 2, "xy")
    mixture = Mixture([one, other], (1, 1))
    assert mixture.classes == ["x", "y"] and mixture.targets == [0, 0, 1, 1, 0, 1, 0, 1]
    assert [mixture.classes[target] for target in mixture.targets] == [
        Path(mixture.name(index)).parent.name for index in range(8)
    ]
    assert np.array_equal(mixture.load(6), other.load(0)) and mixture.load_tensor(6).shape == (3, 9, 9)
    with pytest.raises(IndexError, match="the mixture holds 8 images"):
        mixture.load(8)


def test_parts_with_other_classes_have_none_together(tmp_path: Path) -> None:
    for other in (write(tmp_path / "b", 4, "yz"), SyntheticImages(3)):
        mixture = Mixture([write(tmp_path / "a", 4, "xy"), other])
        assert mixture.targets is None and mixture.classes == []


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_no_held_back_image_is_trained_on_though_the_mixture_repeats_images(tmp_path: Path, fraction: float) -> None:
    mixture = Mixture([write(tmp_path / "a", 8), write(tmp_path / "b", 4)], (1, 5))
    train, holdout = hold_back(mixture, fraction, seed=0)
    assert isinstance(train, Mixture) and isinstance(holdout, Mixture)
    assert train.weights == (1, 5) and len(holdout) == round(12 * fraction)
    assert set(names(train)).isdisjoint(names(holdout)) and len({*names(train), *names(holdout)}) == 12


def test_one_string_names_a_mixture_of_any_data_sets(tmp_path: Path) -> None:
    write(tmp_path / "a + b", 2)  # a path may hold what separates, without the spaces beside a plus
    (tmp_path / "a+b").mkdir()
    write(tmp_path / "a+b", 2)
    spec = f"mix:3*{tmp_path}/a+b + 1e0*synthetic:length=4:size=9x9 + 0.5*folder:root={tmp_path}/a+b"
    mixture = make_dataset(spec)
    assert isinstance(mixture, Mixture) and mixture.weights == (3, 1, 0.5)
    assert [len(part) for part in mixture.parts] == [2, 4, 2]
    assert len(make_dataset(f"mix:{tmp_path}/a+b + synthetic:length=4")) == 6


def test_a_list_of_paths_and_weights_names_a_mixture_too() -> None:
    mixture = make_dataset("mix: [{path: 'synthetic:length=4', weight: 3}, {path: synthetic, weight: 0.5}]")
    assert isinstance(mixture, Mixture) and mixture.weights == (3, 0.5)
    assert [len(part) for part in mixture.parts] == [4, 64]
    assert len(make_dataset("mix:[{path: 'synthetic:length=4'}, {path: synthetic}]")) == 68


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mix:", "expected data sets, no mixture among them"),
        ("mix:synthetic + ", "expected data sets between|neither a known"),
        ("mix:2*synthetic + synthetic", "every data set a weight, or none; the form is mix:"),
        ("mix:0*synthetic", "a weight must be a number above 0; got '0'"),
        ("mix:-1*synthetic", "a weight must be a number above 0; got '-1'"),
        ("mix:1-1*synthetic", "a weight must be a number above 0; got '1-1'"),
        ("mix:mix:synthetic", "no mixture among them"),
        ("mix:[{path: synthetic, weight: 0}]", "a weight must be a number above 0; got '0'"),
        ("mix:[{path: synthetic, wait: 1}]", "expected a list of entries {path: DATASET, weight: NUMBER}"),
        ("mix:[synthetic, synthetic]", "expected a list of entries"),
        ("mix:[{path: synthetic", "the list cannot be read"),
        ("mix:2*synthetik", "did you mean 'synthetic'"),
        ("mix:2*synthetic:lenght=3", "did you mean 'length'"),
    ],
)
def test_faulty_mixtures_are_explained(spec: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        make_dataset(spec)


def test_wrong_numbers_of_weights_are_refused() -> None:
    for weights in ((1,), (1, 0), (1, -2)):
        with pytest.raises(DatasetError, match="expected 2 weights above 0"):
            Mixture([SyntheticImages(2), SyntheticImages(2)], weights)
    with pytest.raises(DatasetError, match="at least one"):
        Mixture([])
