"""The figure of an equivariance measurement: bars of R2 and of similarity, and R2 over the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dinov2_equi.evaluation.equivariance import FamilyScores, ModelScores, mean_and_deviation
from dinov2_equi.evaluation.figures import INK, SERIES_COLORS, style_axes

FEATURE_LABELS = {
    "cls": "class token",
    "patch_mean": "mean patch token",
    "both": "class + mean patch token",
    "invariant": "invariant half",
    "equivariant": "equivariant half",
}
"""Features in words, for figures and tables."""

_COMPARED_FEATURES = ("both", "invariant", "equivariant")  # those of which several backbones are compared
_MAX_CURVES_IN_ROW = 5


@dataclass(frozen=True)
class _Series:
    """Bars of one colour: a value and its spread for each family."""

    label: str
    means: list[float]
    deviations: list[float]
    references: list[float]  # drawn as a tick over each bar; empty for none


def equivariance_figure(models: Mapping[str, ModelScores], curve_features: str) -> Figure:
    """Return the figure of one backbone, by features, or of several, compared by the features that they share.

    Rows: bars of R2 for each family; bars of the cosine similarity of images and copies, with that of different images
    as a tick; one learning curve for each family.

    Args:
        models: what was measured, by the names that the legend shows; at least one.
        curve_features: what the learning curves were measured with.
    """
    families = list(dict.fromkeys(name for scores in models.values() for name in scores.families))
    groups = _bar_groups(models)
    curve_rows = math.ceil(len(families) / _MAX_CURVES_IN_ROW)
    heights = [2.4] * (2 * len(groups)) + [2.3] * curve_rows
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, (title, members) in enumerate(groups):
        r2 = [_r2_series(label, scores, name, families) for label, scores, name in members]
        similarity = [_similarity_series(label, scores, name, families) for label, scores, name in members]
        _draw_bars(figure.add_subplot(rows[2 * row]), families, r2, f"R² of the parameters{title}")
        similarity_title = f"Cosine similarity of image and copy{title}; tick: of different images"
        _draw_bars(figure.add_subplot(rows[2 * row + 1]), families, similarity, similarity_title)
    for row in range(curve_rows):
        shown = families[row * _MAX_CURVES_IN_ROW : (row + 1) * _MAX_CURVES_IN_ROW]
        columns = rows[2 * len(groups) + row].subgridspec(1, min(len(families), _MAX_CURVES_IN_ROW))
        for column, family in enumerate(shown):
            what = FEATURE_LABELS.get(curve_features, curve_features).replace(" + ", " +\n")
            _draw_curves(figure.add_subplot(columns[column]), family, models, what if row + column == 0 else "")
    return figure


def _bar_groups(models: Mapping[str, ModelScores]) -> list[tuple[str, list[tuple[str, ModelScores, str]]]]:
    """Return what shares a pair of axes: (words added to the title, [(label, scores, features)])."""
    if len(models) == 1:
        (scores,) = models.values()
        names = _features_of(scores)
        return [("", [(FEATURE_LABELS.get(name, name), scores, name) for name in names])]
    every = {name for scores in models.values() for name in _features_of(scores)}
    compared = [name for name in _COMPARED_FEATURES if name in every] or sorted(every)[:1]
    return [
        (
            f", {FEATURE_LABELS.get(name, name)}",
            [(label, scores, name) for label, scores in models.items() if name in _features_of(scores)],
        )
        for name in compared
    ]


def _features_of(scores: ModelScores) -> list[str]:
    return list(scores.different_similarity)


def _r2_series(label: str, scores: ModelScores, name: str, families: Sequence[str]) -> _Series:
    def values(family: FamilyScores) -> list[float]:
        return [probe.r2_pooled for probe in family.probes[name]]

    return _Series(label, *_mean_and_deviation(scores, families, values), references=[])


def _similarity_series(label: str, scores: ModelScores, name: str, families: Sequence[str]) -> _Series:
    def values(family: FamilyScores) -> list[float]:
        return family.similarity[name]

    references = [scores.different_similarity[name]] * len(families)
    return _Series(label, *_mean_and_deviation(scores, families, values), references=references)


def _mean_and_deviation(
    scores: ModelScores, families: Sequence[str], values: Callable[[FamilyScores], list[float]]
) -> tuple[list[float], list[float]]:
    """Return the mean and the deviation over the seeds for each family; NaN where it was not measured."""
    found = [values(scores.families[name]) if name in scores.families else [math.nan] for name in families]
    pairs = [mean_and_deviation(v) for v in found]
    return [mean for mean, _ in pairs], [deviation or 0.0 for _, deviation in pairs]


def _draw_bars(axes: Axes, families: Sequence[str], series: Sequence[_Series], title: str) -> None:
    """Draw groups of bars, one group a family, one colour a series; whiskers are one standard deviation."""
    style_axes(axes)
    axes.grid(axis="x", visible=False)
    width = 0.8 / len(series)
    for index, bars in enumerate(series):
        centers = [group - 0.4 + width * (index + 0.5) for group in range(len(families))]
        color = SERIES_COLORS[index % len(SERIES_COLORS)]
        axes.bar(centers, bars.means, width=0.88 * width, color=color, label=bars.label)
        if any(bars.deviations):
            axes.errorbar(centers, bars.means, bars.deviations, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2)
        if bars.references:
            left, right = [c - 0.44 * width for c in centers], [c + 0.44 * width for c in centers]
            axes.hlines(bars.references, left, right, colors=INK, linewidth=1.6)
    axes.axhline(0, color=INK, linewidth=1, alpha=0.6)
    axes.set_xticks(range(len(families)), families)
    axes.set_xlim(-0.5, len(families) - 0.5)
    axes.set_ylim(*_limits(series))
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _limits(series: Sequence[_Series]) -> tuple[float, float]:
    """Return 0 to 1, wider where a bar is below: how far below 0 an R2 is says little, so that -0.3 is the end."""
    ends = [mean - spread for bars in series for mean, spread in zip(bars.means, bars.deviations, strict=True)]
    ends += [reference for bars in series for reference in bars.references]
    lowest = min((end for end in ends if math.isfinite(end)), default=0.0)
    return max(min(1.15 * lowest, 0.0), -0.3), 1.02


def _draw_curves(axes: Axes, family: str, models: Mapping[str, ModelScores], what: str) -> None:
    """Draw R2 over the number of training pairs, one line a backbone, the deviation over the seeds as a band."""
    style_axes(axes)
    for index, scores in enumerate(models.values()):
        if family not in scores.families:
            continue
        curve = scores.families[family].curve
        counts = list(curve)
        pairs = [mean_and_deviation(values) for values in curve.values()]
        means, spread = [mean for mean, _ in pairs], [deviation or 0.0 for _, deviation in pairs]
        color = SERIES_COLORS[index % len(SERIES_COLORS)]
        axes.plot(counts, means, color=color, linewidth=2, marker="o", markersize=4)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(counts, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_title(family, color=INK, fontsize=11, loc="left")
    axes.set_xlabel("training pairs", color=INK, fontsize=9)
    if what:
        axes.set_ylabel(f"R², {what}", color=INK, fontsize=9)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
