"""Figures as files: an SVG that takes its colours from the page, a PNG, and no global state."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinov2_equi.evaluation import figures
from dinov2_equi.evaluation.figures import INK, figure_array, figure_png, figure_svg, plot_axes


def example() -> Figure:
    figure, axes = plot_axes(3, 2)
    axes.plot([0, 1], [2, 3])
    axes.set_xlabel("step & more", color=INK)
    return figure


@pytest.fixture
def figure() -> Figure:
    return example()


def test_svg_is_one_well_formed_element_with_a_description(figure: Figure) -> None:
    root = ET.fromstring(figure_svg(figure, 'loss < 1 & "more"'))
    assert root.tag.endswith("svg")
    assert root.get("aria-label") == 'loss < 1 & "more"'
    assert root.get("viewBox") and root.get("width") is None and root.get("height") is None


def test_svg_text_and_axes_take_the_colour_of_the_page(figure: Figure) -> None:
    svg = figure_svg(figure, "x")
    assert "currentColor" in svg and INK not in svg
    assert "step &amp; more" in svg  # real text, set in the page's font
    assert "#000000" not in svg and "fill: #ffffff" not in svg  # unreadable on a dark page, glaring on a dark page


def test_svg_of_the_same_data_is_the_same_every_time() -> None:
    assert figure_svg(example(), "x") == figure_svg(example(), "x")


def test_pixels_are_on_a_white_panel_and_are_those_of_the_png(figure: Figure) -> None:
    pixels = figure_array(figure)
    assert pixels.dtype == np.uint8 and pixels.shape == (220, 330, 3)  # 2 x 3 inches at 110 dots an inch
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels.min() < 200
    with Image.open(io.BytesIO(figure_png(figure))) as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")).shape, pixels.shape)


def test_settings_of_matplotlib_are_given_back(figure: Figure) -> None:
    before = dict(mpl.rcParams)
    figure_svg(figure, "x")
    assert dict(mpl.rcParams) == before


def test_pyplot_with_its_global_figures_is_never_imported() -> None:
    files = list(Path(figures.__file__).parent.glob("*.py"))
    assert len(files) > 5
    assert not [file.name for file in files if re.search(r"^\s*(from|import) .*pyplot", file.read_text(), re.MULTILINE)]
