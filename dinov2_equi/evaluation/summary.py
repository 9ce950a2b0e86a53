"""One table and one figure from many results files: a line a backbone, a column a number."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from dinov2_equi.evaluation.classification import TASKS
from dinov2_equi.evaluation.figures import INK, SERIES_COLORS, plot_axes

LEAST_RADAR_COLUMNS = 3

Document = Mapping[str, Any]
"""A results file, as `write_results` wrote it."""

Cells = Mapping[str, Mapping[str, float]]
"""Backbone -> title of a column -> number."""

COMPARED_FEATURES = "both"
"""Features whose R2 stands in the table; the first ones measured where these were not."""


def headline_numbers(document: Document) -> dict[str, float]:
    """Return the numbers of a results file of one backbone that a table shows, by title.

    Raises:
        ValueError: for a results file of a task that has no headline; names it.
    """
    task = str(document["task"])
    if task not in _HEADLINES:
        raise ValueError(f"no headline is known for results of {task!r}; known: {', '.join(_HEADLINES)}")
    (numbers,) = document["numbers"].values()
    return _HEADLINES[task](numbers)


def _classification(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {TASKS[name].title: TASKS[name].headline(dict(found)) for name, found in numbers.items()}


def _equivariance(numbers: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for family, scores in numbers["families"].items():
        features = COMPARED_FEATURES if COMPARED_FEATURES in scores["r2"] else next(iter(scores["r2"]))
        found[f"R2 {family}"] = float(scores["r2"][features]["pooled"]["mean"])
    return found


def _video(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(numbers[name]) for name in ("J&F", "J", "F", "mIoU") if numbers.get(name) is not None}


def _homography(numbers: Mapping[str, Any]) -> dict[str, float]:
    # As a share of standing still it fits a table of fractions; 0 is perfect.
    return {"corner error": float(numbers["mean_corner_error"]) / float(numbers["identity_corner_error"])}


def _dense_equivariance(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {f"dense {family}": float(found["moved_centred"]) for family, found in numbers.items()}


def _depth(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {"depth RMSE, m": float(numbers["rmse"]), "depth delta1": float(numbers["delta1"])}


def _corruptions(numbers: Mapping[str, Any]) -> dict[str, float]:
    found = {"clean error": numbers["clean"], "corrupted error": numbers["mean_error"], "mCE": numbers["mce"]}
    return {title: float(value) for title, value in found.items() if value is not None}


def _segmentation(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {"mIoU": float(numbers["miou"])}


def _detection(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {f"{kind} AP": float(numbers[kind]["AP"]) for kind in ("box", "mask") if kind in numbers}


_HEADLINES: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "classification": _classification,
    "corruptions": _corruptions,
    "equivariance": _equivariance,
    "video": _video,
    "homography": _homography,
    "dense_equivariance": _dense_equivariance,
    "depth": _depth,
    "segmentation": _segmentation,
    "detection": _detection,
}


def columns_of(cells: Cells) -> list[str]:
    """Return the titles of all columns, in the order in which they appear."""
    return list(dict.fromkeys(title for row in cells.values() for title in row))


def _rows(cells: Cells, digits: int) -> list[list[str]]:
    titles = columns_of(cells)
    return [[name, *(f"{row[t]:.{digits}f}" if t in row else "" for t in titles)] for name, row in cells.items()]


def as_markdown(cells: Cells, *, digits: int = 3) -> str:
    """Return the table in Markdown."""
    rows = _rows(cells, digits)
    text: str = tabulate(rows, headers=["", *columns_of(cells)], tablefmt="github", disable_numparse=True)
    return text + "\n"


def as_latex(cells: Cells, *, digits: int = 3) -> str:
    """Return the table in LaTeX, for the package booktabs."""
    rows = _rows(cells, digits)
    text: str = tabulate(rows, headers=["", *columns_of(cells)], tablefmt="latex_booktabs", disable_numparse=True)
    return text + "\n"


def as_csv(cells: Cells) -> str:
    """Return the table as comma-separated values, with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    titles = columns_of(cells)
    writer.writerow(["model", *titles])
    writer.writerows([name, *(row.get(title, "") for title in titles)] for name, row in cells.items())
    return buffer.getvalue()


def bar_figure(cells: Cells) -> Figure:
    """Return bars for each column, one colour a backbone; a number below -0.3 ends there.

    Raises:
        ValueError: without a number.
    """
    titles = columns_of(cells)
    if not titles:
        raise ValueError("expected at least one number to draw, got none")
    figure, axes = plot_axes(max(5.0, 1.1 * len(titles) + 2.5), 3.4)
    axes.grid(axis="x", visible=False)
    width = 0.8 / len(cells)
    for index, (name, row) in enumerate(cells.items()):
        places = [group - 0.4 + width * (index + 0.5) for group in range(len(titles))]
        heights = _heights(row, titles)
        axes.bar(places, heights, width=0.88 * width, color=SERIES_COLORS[index % len(SERIES_COLORS)], label=name)
    axes.axhline(0, color=INK, linewidth=1, alpha=0.6)
    axes.set_xticks(range(len(titles)), titles, rotation=20, ha="right")
    drawn = [height for row in cells.values() for height in _heights(row, titles)]
    axes.set_ylim(-0.32 if min(drawn) < 0 else 0.0, 1.02 * max(1.0, *drawn))  # an RMSE of depth may exceed 1
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def radar_figure(cells: Cells) -> Figure | None:
    """Return one axis for each column and one closed line a backbone; a number below 0 lies in the centre.

    Axes go from 0 to 1. A backbone that lacks a number has a gap there. None for fewer than three columns, which make
    no area.
    """
    titles = columns_of(cells)
    if len(titles) < LEAST_RADAR_COLUMNS:
        return None
    angles = [2 * math.pi * index / len(titles) for index in range(len(titles))]
    figure = Figure(figsize=(7.0, 5.6))
    axes: Any = figure.add_axes((0.25, 0.26, 0.5, 0.625), projection="polar")  # room for titles on both sides
    axes.set_theta_offset(math.pi / 2)  # the first column points up,
    axes.set_theta_direction(-1)  # the others follow clockwise
    for index, (name, row) in enumerate(cells.items()):
        color = SERIES_COLORS[index % len(SERIES_COLORS)]
        radii = [max(row.get(title, math.nan), 0.0) if title in row else math.nan for title in titles]
        axes.plot([*angles, angles[0]], [*radii, radii[0]], color=color, linewidth=1.8, marker="o", ms=4, label=name)
        if not any(map(math.isnan, radii)):
            axes.fill(angles, radii, color=color, alpha=0.10)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"])
    axes.set_rlabel_position(180 / len(titles))  # between two axes
    axes.set_xticks(angles, titles)
    axes.tick_params(colors=INK, labelsize=10, pad=4)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)  # above 0: on the right
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.grid(color=INK, alpha=0.18, linewidth=0.8)
    axes.spines["polar"].set_color(INK)
    axes.spines["polar"].set_alpha(0.3)
    figure.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower center", ncols=min(3, len(cells)))
    return figure


def _heights(row: Mapping[str, float], titles: Sequence[str]) -> list[float]:
    values = (row.get(title, math.nan) for title in titles)
    return [max(value, -0.3) if math.isfinite(value) else 0.0 for value in values]
