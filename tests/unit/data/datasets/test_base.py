"""What all data sets share."""

from __future__ import annotations

import pytest

from dinov2_equi.data.datasets.base import spread_indices


@pytest.mark.parametrize(
    ("length", "count", "indices"), [(10, 4, [0, 2, 5, 7]), (2, 4, [0, 1]), (1, 1, [0]), (0, 3, []), (3, 0, [])]
)
def test_indices_are_bunched_or_repeated(length: int, count: int, indices: list[int]) -> None:
    assert spread_indices(length, count) == indices
