"""What the common table shows of video, homography and dense equivariance."""

from __future__ import annotations

from typing import Any

import pytest

from dinov2_equi.evaluation.summary import headline_numbers


@pytest.mark.parametrize(
    ("task", "numbers", "expected"),
    [
        ("video", {"J&F": 0.5, "J": 0.4, "F": 0.6, "J recall": 0.1, "clips": {}}, {"J&F": 0.5, "J": 0.4, "F": 0.6}),
        ("video", {"mIoU": 0.25, "clips": {}}, {"mIoU": 0.25}),
        ("video", {"J&F": None, "J": None, "F": None}, {}),
        ("homography", {"mean_corner_error": 6.0, "identity_corner_error": 24.0}, {"corner error": 0.25}),
        ("dense_equivariance", {"blur": {"moved": 0.9, "moved_centred": 0.5}}, {"dense blur": 0.5}),
    ],
)
def test_a_dense_task_has_no_headline(task: str, numbers: dict[str, Any], expected: dict[str, float]) -> None:
    assert headline_numbers({"task": task, "numbers": {"mine": numbers}}) == expected
