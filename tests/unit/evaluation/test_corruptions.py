"""The mean corruption error against a plain loop, and where it has no value."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.evaluation.corruptions import ALEXNET_ERRORS, mean_corruption_error, mean_error


@pytest.fixture
def errors() -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(0)
    return {name: {level: float(rng.uniform()) for level in range(1, 6)} for name in ALEXNET_ERRORS}


def test_mce_is_not_the_mean_of_the_ratios_to_alexnet(errors: dict[str, dict[int, float]]) -> None:
    ratios = []
    for name, of in errors.items():
        ours = alexnet = 0.0
        for level in range(1, 6):
            ours += of[level]
            alexnet += ALEXNET_ERRORS[name]  # its mean in place of each severity: only the sum counts
        ratios.append(ours / alexnet)
    assert mean_corruption_error(errors) == pytest.approx(np.mean(ratios), rel=1e-12)  # float64, another order
    alexnet_itself = {name: dict.fromkeys(range(1, 6), error) for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(alexnet_itself) == pytest.approx(1.0)


def test_corruption_beyond_the_fifteen_changes_mce(errors: dict[str, dict[int, float]]) -> None:
    more = errors | {"saturate": dict.fromkeys(range(1, 6), 1.0)}
    assert mean_corruption_error(more) == mean_corruption_error(errors)
    assert mean_error(more) > mean_error(errors)


def test_mce_of_a_part_of_the_corruptions_is_given(errors: dict[str, dict[int, float]]) -> None:
    without_fog = {name: of for name, of in errors.items() if name != "fog"}
    without_a_severity = errors | {"fog": dict.fromkeys((1, 2, 3, 5), 0.5)}
    assert mean_corruption_error(without_fog) is None
    assert mean_corruption_error(without_a_severity) is None
    assert mean_error({"fog": {1: 0.2, 5: 0.4}, "snow": {3: 0.9}}) == pytest.approx(0.6)
