"""Numbers of results files in the table and the figure of several backbones."""

from __future__ import annotations

from dinov2_equi.evaluation.summary import bar_figure, headline_numbers


def test_bar_of_a_large_error_is_cut_off() -> None:
    (axes,) = bar_figure({"a": {"depth RMSE, m": 3.5, "mIoU": 0.4}, "b": {"mIoU": 0.5}}).axes
    assert axes.get_ylim() == (0.0, 1.02 * 3.5)
    (axes,) = bar_figure({"a": {"mIoU": 0.4}}).axes
    assert axes.get_ylim() == (0.0, 1.02)
    (axes,) = bar_figure({"a": {"R2": -2.0}}).axes
    assert axes.get_ylim() == (-0.32, 1.02)


def test_task_has_no_headline() -> None:
    box = {"AP": 0.3, "AP50": 0.5}
    for task, numbers, wanted in (
        ("depth", {"rmse": 0.4, "delta1": 0.9, "abs_rel": 0.1}, {"depth RMSE, m": 0.4, "depth delta1": 0.9}),
        ("segmentation", {"miou": 0.5, "pixel_accuracy": 0.9}, {"mIoU": 0.5}),
        ("detection", {"box": box, "mask": {"AP": 0.2}}, {"box AP": 0.3, "mask AP": 0.2}),
        ("detection", {"box": box}, {"box AP": 0.3}),
    ):
        assert headline_numbers({"task": task, "numbers": {"model": numbers}}) == wanted
