"""Classes known by numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.data.datasets.numbered_classes import NO_CLASS, NumberedClasses


@pytest.mark.parametrize(
    ("labels", "targets", "classes"),
    [
        ([7, 10, 7, 2], [1, 2, 1, 0], ["2", "7", "10"]),
        ([0, NO_CLASS, 1], None, []),
        ([], None, []),
    ],
)
def test_classes_are_sorted_as_text_or_known_of_some_images_alone(
    labels: list[int], targets: list[int] | None, classes: list[str]
) -> None:
    found = NumberedClasses(np.array(labels, np.int32))
    assert found.targets == targets and found.classes == classes
