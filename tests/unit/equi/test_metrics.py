"""Names and values of the branch's log figures."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_equi.equi.metrics import psnr, reconstruction_metrics


@pytest.mark.parametrize(("error", "decibel"), [(1.0, 0.0), (0.01, 20.0), (0.25, 6.0206), (1e-4, 40.0)])
def test_psnr_equals_its_definition(error: float, decibel: float) -> None:
    assert psnr(torch.tensor(error)).item() == pytest.approx(decibel, abs=1e-3)  # float32 logarithm, times 10


def test_psnr_of_a_perfect_image_is_finite() -> None:
    assert psnr(torch.tensor(0.0)).item() == pytest.approx(100.0)


def test_psnr_of_a_broken_image_stays_broken() -> None:
    assert math.isnan(psnr(torch.tensor(math.nan)).item())


def test_steps_are_counted_from_one() -> None:
    metrics = reconstruction_metrics(torch.tensor([0.01, 0.25]))
    assert {name: round(value.item(), 3) for name, value in metrics.items()} == {
        "equi/error_step_1": 0.01,
        "equi/error_step_2": 0.25,
        "equi/psnr_step_1": 20.0,
        "equi/psnr_step_2": 6.021,
    }


def test_metrics_are_detached() -> None:
    errors = torch.tensor([0.01, 0.25], requires_grad=True)
    assert not any(value.requires_grad for value in reconstruction_metrics(errors * 2).values())
