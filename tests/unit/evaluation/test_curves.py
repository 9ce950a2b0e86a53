"""Panels of training curves: which there are, in which order, and what they show."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.evaluation.curves import _smooth, total_loss_series, training_panels


def lines(n: int) -> list[dict[str, float]]:
    return [
        {
            "iteration": 10 * i, "total_loss": 9.0 - i, "koleo_loss": 0.1, "ibot_loss": 2.0,
            "dino_local_crops_loss": 3.0, "dino_global_crops_loss": 4.0,
            "equi_loss": 0.05, "odd_loss": 1.0, "lr": 1e-3, "grad_norm": 2.0,
            "equi/psnr_step_1": 20.0, "equi/psnr_step_2": 19.0, "time/step": 0.3,
        }
        for i in range(n)
    ]  # fmt: skip


def test_total_comes_first_then_the_terms_in_a_fixed_order_then_quality_and_rates() -> None:
    assert [panel.title for panel in training_panels(lines(5))] == [
        "Total loss", "DINO, global crops", "DINO, local crops", "iBOT, masked patches", "KoLeo, spread",
        "Reconstruction", "odd_loss", "Reconstruction quality", "Learning rate", "Gradient norm",
    ]  # fmt: skip


def test_a_baseline_without_the_branch_has_no_reconstruction_panel() -> None:
    metrics = [{key: value for key, value in line.items() if "equi" not in key} for line in lines(5)]
    assert not [panel for panel in training_panels(metrics) if "Reconstruction" in panel.title]


def test_the_lines_are_what_was_logged() -> None:
    axes = training_panels(lines(5))[0].figure.axes[0]
    assert len(axes.lines) == 1  # too few points to smooth
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20, 30, 40])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [9, 8, 7, 6, 5])


def test_a_long_noisy_curve_gets_its_moving_average_on_top() -> None:
    axes = training_panels(lines(100))[0].figure.axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [100, 100]
    assert axes.lines[0].get_alpha() < 0.5


def test_moving_average_equals_a_loop_and_ends_are_not_pulled_to_zero() -> None:
    values = np.random.default_rng(0).normal(5, 1, 100)
    expected = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(100)]
    np.testing.assert_allclose(_smooth(values), expected, rtol=1e-12)


def test_both_steps_of_the_path_share_one_panel_with_a_legend() -> None:
    quality = next(panel for panel in training_panels(lines(5)) if panel.title == "Reconstruction quality")
    assert [text.get_text() for text in quality.figure.axes[0].get_legend().get_texts()] == ["image 1", "image 2"]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_missing_and_infinite_values_are_left_out(missing: float | None) -> None:
    metrics = lines(3)
    metrics[1]["total_loss"] = missing  # type: ignore[assignment]
    del metrics[2]["lr"]
    assert total_loss_series(metrics)[0].tolist() == [0, 20]
    assert "Learning rate" in [panel.title for panel in training_panels(metrics)]


def test_no_lines_or_none_finite_give_no_panels_instead_of_an_error() -> None:
    assert training_panels([]) == []
    assert training_panels([{"iteration": 0, "total_loss": float("nan"), "ibot_loss": float("nan")}]) == []
    assert len(training_panels([{"iteration": 0, "total_loss": 1.0}])) == 1
