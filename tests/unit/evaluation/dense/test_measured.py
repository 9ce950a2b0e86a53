"""What is measured while a head is trained: kept through a stop, and of this training alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dinov2_equi.evaluation.dense.measured import MeasuredCurve, measured_figure

TRAINING = {"weights": "a", "sizes": [1, 2]}


def test_curve_is_lost_or_doubled_by_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    first = MeasuredCurve(path, 8, TRAINING)
    for step in (2, 4, 6):
        first.add(step, {"AP50": step / 10, "AP": math.nan})
    again = MeasuredCurve(path, 8, TRAINING)  # goes on from a checkpoint of step 3
    assert again.has(4) and not again.has(3)
    again.add(4, {"AP50": 0.5, "AP": 0.1})
    found = again.columns(last={"AP50": 0.9, "AP": 0.2})
    assert found["step"] == [2, 4, 8] and found["AP50"] == [0.2, 0.5, 0.9]
    assert math.isnan(found["AP"][0]) and found["AP"][1:] == [0.1, 0.2]
    assert MeasuredCurve(path, 8, TRAINING).columns()["step"] == [2, 4]


def test_curve_holds_another_training(tmp_path: Path) -> None:
    MeasuredCurve(tmp_path / "curve.json", 8, TRAINING).add(2, {"AP50": 0.3})
    other = MeasuredCurve(tmp_path / "curve.json", 8, TRAINING | {"weights": "b"})
    other.add(3, {"AP50": 0.4})
    assert other.columns()["step"] == [3]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"entries": [{}]}', '{"training": "x", "entries": [{"step": 2}, {"step": 2}]}']
)
def test_broken_curve_ends_a_training(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "curve.json"
    path.write_text(text)
    curve = MeasuredCurve(path, 8, TRAINING)
    assert curve.columns() == {} and "curve.json does not hold what was measured" in caplog.text
    curve.add(2, {"AP50": 0.3})
    assert MeasuredCurve(path, 8, TRAINING).has(2)


def test_figure_has_no_line_of_a_number(tmp_path: Path) -> None:
    columns = {"step": [2.0, 4.0], "box AP50": [0.1, math.nan], "box AP": [0.0, 0.2]}
    figure = measured_figure(columns, {"step": [1.0, 4.0], "loss": [3.0, 2.0]}, title="x")
    numbers, losses = figure.axes
    assert [line.get_label() for line in numbers.get_lines()] == ["box AP50", "box AP"]
    assert list(losses.get_lines()[0].get_ydata()) == [3.0, 2.0]


def test_nan_is_written_as_no_json(tmp_path: Path) -> None:
    MeasuredCurve(tmp_path / "curve.json", 8, TRAINING).add(2, {"AP50": math.nan})
    assert json.loads((tmp_path / "curve.json").read_text())["entries"] == [{"step": 2, "AP50": None}]
