"""The photographs that come with scikit-image and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinov2_equi.data.datasets import sample_photos
from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.sample_photos import SamplePhotos


@pytest.fixture(scope="module")
def photos() -> SamplePhotos:
    return SamplePhotos()


def test_held_back_photographs_are_not_trained_on(photos: SamplePhotos) -> None:
    val = SamplePhotos("VAL")
    assert not set(photos.classes) & set(val.classes)
    assert len(val.classes) >= 3


def test_regions_are_square_in_colour_and_of_the_promised_sides(photos: SamplePhotos) -> None:
    for index in range(3 * len(photos.classes)):
        image = photos.load(index)
        photo = photos._photo_levels(index % len(photos.classes))[0]
        short_side = min(photo.shape[1:])
        assert image.mode == "RGB"
        assert image.size[0] == image.size[1]
        assert round(0.2 * short_side) <= image.size[0] <= short_side


def test_regions_are_fixed_and_differ(photos: SamplePhotos) -> None:
    again = SamplePhotos()
    num_photos = len(photos.classes)
    assert torch.equal(photos.load_tensor(5), again.load_tensor(5))
    assert photos.load_tensor(5).shape != photos.load_tensor(5 + num_photos).shape


def test_a_region_does_not_depend_on_the_number_of_regions() -> None:
    assert torch.equal(SamplePhotos("VAL", 3).load_tensor(2), SamplePhotos("VAL", 300).load_tensor(2))


def test_image_and_tensor_hold_the_same_pixels(photos: SamplePhotos) -> None:
    image = np.asarray(photos.load(1))
    assert np.array_equal(image, photos.load_tensor(1).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("min_short_side", [32, 64, 100])
def test_smaller_version_keeps_the_short_side_asked_for(photos: SamplePhotos, min_short_side: int) -> None:
    sides = [
        (min(photos.load_tensor(index).shape[1:]), min(photos.load_tensor(index, min_short_side).shape[1:]))
        for index in range(2 * len(photos.classes))
    ]
    assert all(small >= min(min_short_side, full) for full, small in sides)
    assert any(small < full for full, small in sides)


def test_smaller_version_shows_the_same_region(photos: SamplePhotos) -> None:
    for index in range(len(photos.classes)):
        full = photos.load_tensor(index)[None].float()
        small = photos.load_tensor(index, 64)[None].float()
        expected = F.interpolate(full, size=small.shape[2:], mode="bilinear", antialias=True)
        # Half a pixel of the small version lies between the two regions: compare coarse averages, in 0..255.
        difference = F.adaptive_avg_pool2d(small, 6) - F.adaptive_avg_pool2d(expected, 6)
        assert difference.abs().mean() < 3


def test_targets_name_the_photograph(photos: SamplePhotos) -> None:
    targets = photos.targets
    assert len(targets) == len(photos)
    assert all(photos.name(index).startswith(photos.classes[targets[index]] + "/") for index in range(20))
    assert len({photos.name(index) for index in range(100)}) == 100


def test_photographs_have_colour_and_detail(photos: SamplePhotos) -> None:
    for dataset in (photos, SamplePhotos("VAL")):
        for number in range(len(dataset.classes)):
            photo = dataset._photo_levels(number)[0].float()
            assert photo.std() > 10
            assert (photo.amax(0) - photo.amin(0)).mean() > 5


def test_unknown_split_and_no_regions_are_refused() -> None:
    with pytest.raises(DatasetError, match="TRAIN, VAL"):
        SamplePhotos("TEST")
    with pytest.raises(DatasetError, match="regions=0"):
        SamplePhotos(regions=0)


def test_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install scikit-image"):
        SamplePhotos()


def test_missing_file_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(sample_photos.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(DatasetError, match=rf"{tmp_path}/data/astronaut\.png"):
        SamplePhotos()
