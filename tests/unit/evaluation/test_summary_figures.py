"""Figures of a comparison: what is drawn is what was measured."""

from __future__ import annotations

import math

import pytest

from dinov2_equi.evaluation.figures import figure_png
from dinov2_equi.evaluation.summary import radar_figure

CELLS = {
    "trained": {"k-NN": 0.6, "linear": 0.7, "R2 rotation": 0.5, "R2 blur": -0.2},
    "random": {"k-NN": 0.3, "linear": 0.4, "R2 rotation": 0.2},
}


def test_radar_shows_other_numbers_than_those_measured() -> None:
    figure = radar_figure(CELLS)
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == list(CELLS["trained"])
    trained, random = axes.get_lines()
    assert list(trained.get_ydata()) == pytest.approx([0.6, 0.7, 0.5, 0.0, 0.6])  # closed; below 0 in the centre
    assert list(trained.get_xdata()[:4]) == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    drawn = list(random.get_ydata())
    assert drawn[:3] == pytest.approx([0.3, 0.4, 0.2]) and math.isnan(drawn[3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trained", "random"]
    assert figure_png(figure).startswith(b"\x89PNG")


def test_two_numbers_make_an_area() -> None:
    assert radar_figure({"a": {"k-NN": 0.5, "linear": 0.5}}) is None
