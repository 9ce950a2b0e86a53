"""How figures look and how they leave matplotlib: PNG for files and TensorBoard, themed SVG for the report.

Figures are drawn with matplotlib's objects, never through pyplot, so that nothing global is left behind. All text and
all axes use the one colour `INK`, which the SVG turns into the colour of the surrounding page: the same figure is then
readable on a light and on a dark background.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dinov2_equi.evaluation.results import write_bytes_atomically

INK = "#5b6472"
"""Colour of text and axes; mid grey in PNG files, the page's own text colour in inline SVG."""

BLUE, ORANGE, GREEN, PURPLE, PINK = "#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ec4899"
SERIES_COLORS = (BLUE, ORANGE, GREEN, PURPLE, PINK)
"""Line colours of medium lightness: they stand out on white and on near-black alike."""

_FONT_POINTS = 10.0
_PNG_DPI = 110
_SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "dinov2_equi"}


def figure_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes on a white panel."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white")
    return buffer.getvalue()


def write_figure(path: Path, figure: Figure) -> None:
    """Write the figure as a PNG file, whole or not at all."""
    write_bytes_atomically(path, figure_png(figure))


def figure_array(figure: Figure) -> NDArray[np.uint8]:
    """Return the figure as pixels [H, W, 3] uint8 on a white panel."""
    with Image.open(io.BytesIO(figure_png(figure))) as picture:
        return np.asarray(picture.convert("RGB"))


def figure_svg(figure: Figure, description: str) -> str:
    """Return the figure as an `<svg>` element to be placed in a page, which lends it text colour and font.

    Args:
        figure: drawn with `INK` for text and axes.
        description: what a screen reader says in place of the picture.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_SVG_SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # the XML prologue and doctype are not allowed inside HTML
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page decides the size, the viewBox the shape
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return svg.replace(INK, "currentColor")


def plot_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of `width` x `height` inches with one pair of axes in the house style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the house style: a light grid, no frame above and to the right, `INK` for all text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.spines[["left", "bottom"]].set_alpha(0.5)
    axes.tick_params(colors=INK, labelsize=_FONT_POINTS, length=3)
    axes.grid(color=INK, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)
