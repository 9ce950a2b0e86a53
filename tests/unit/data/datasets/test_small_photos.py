"""The small photographs of scikit-image, as a data set to probe with."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.small_photos import SPLITS, SmallPhotos


def test_an_image_is_in_both_splits_or_in_none() -> None:
    names = [{photos.name(i) for i in range(len(photos))} for photos in (SmallPhotos("TRAIN"), SmallPhotos("TEST"))]
    assert len(names[0]) == 140 and len(names[1]) == 60
    assert not names[0] & names[1]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_lacks_faces_or_backgrounds(split: str) -> None:
    targets = SmallPhotos(split).targets
    assert targets.count(0) == targets.count(1)


def test_pixels_are_not_those_of_the_package() -> None:
    from skimage.data import lfw_subset

    photos = SmallPhotos("TEST")
    number = int(photos.name(3).split("/")[1])
    pixels = photos.load_tensor(3).numpy()  # [3, 25, 25]
    # uint8 rounds to the nearest of 255 levels
    np.testing.assert_allclose(pixels[0] / 255, lfw_subset()[number], atol=0.5 / 255 + 1e-6)
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


def test_an_unknown_split_is_not_explained() -> None:
    with pytest.raises(DatasetError, match="TRAIN, TEST"):
        SmallPhotos("VAL")


def test_the_name_in_a_config_is_not_known() -> None:
    assert len(make_dataset("small_photos:split=TEST")) == 60
