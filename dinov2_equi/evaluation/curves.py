"""Training curves as a list of small panels, one a quantity, from the lines of training_metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dinov2_equi.evaluation.figures import BLUE, GREEN, INK, ORANGE, SERIES_COLORS, plot_axes

Metrics = Sequence[Mapping[str, float]]
"""Lines of training_metrics.json: each has "iteration" and some scalars."""

TOTAL_LOSS_KEYS = ("total_loss", "loss/total", "loss")
_MIN_POINTS_TO_SMOOTH = 40

_TERMS = (  # part of the key, title, one sentence for a newcomer
    ("dino_global", "DINO, global crops", "How well one large crop predicts what the teacher sees in the other one."),
    ("dino_local", "DINO, local crops", "How well a small crop predicts what the teacher sees in the large ones."),
    ("dino", "DINO", "How well one crop predicts what the teacher sees in another one."),
    ("ibot", "iBOT, masked patches", "How well hidden patches are guessed from the visible ones."),
    ("koleo", "KoLeo, spread", "Pushes the images of a batch apart, so that features do not collapse to one point."),
    ("vicreg_invariance", "VICReg, invariance", "How far apart the embeddings of the two large crops of an image lie."),
    ("vicreg_variance", "VICReg, variance", "How much the channels fall short of telling images apart; 0 is the aim."),
    ("vicreg_covariance", "VICReg, covariance", "How much channels repeat each other."),
    ("equi", "Reconstruction", "Error of the images rebuilt from the equivariant features alone: the new task."),
)
_RATES = (
    ("lr", "Learning rate", "Size of the optimiser's steps: warm-up, then a cosine down to the end."),
    ("grad_norm", "Gradient norm", "Length of the gradient before clipping; spikes point to unstable training."),
)
_PSNR_PREFIX = "equi/psnr_step_"


@dataclass(frozen=True)
class Panel:
    """One small chart with the words that go around it."""

    title: str
    explanation: str
    figure: Figure


def total_loss_series(metrics: Metrics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and values of the total loss, both [n] and possibly empty."""
    for key in TOTAL_LOSS_KEYS:
        steps, values = _series(metrics, key)
        if len(steps):
            return steps, values
    return np.empty(0), np.empty(0)


def training_panels(metrics: Metrics) -> list[Panel]:
    """Return one panel for the total loss, each of its terms, the reconstruction quality and the rates.

    A quantity that was never logged, or never with a finite value, has no panel.
    """
    panels = []
    steps, values = total_loss_series(metrics)
    if len(steps):
        explanation = "The weighted sum that is minimised. Its target, the teacher, moves too: it need not only fall."
        panels.append(Panel("Total loss", explanation, _line_figure([("total", steps, values)], colors=(BLUE,))))
    panels += _term_panels(metrics)
    panels += _psnr_panels(metrics)
    for key, title, explanation in _RATES:
        steps, values = _series(metrics, key)
        if len(steps):
            panels.append(Panel(title, explanation, _line_figure([(title, steps, values)], colors=(GREEN,))))
    return panels


def _term_panels(metrics: Metrics) -> list[Panel]:
    keys = {key for line in metrics for key in line}
    terms = sorted(key for key in keys if _is_term(key))
    panels = []
    for key in sorted(terms, key=lambda key: (_term_rank(key), key)):
        steps, values = _series(metrics, key)
        if not len(steps):
            continue
        rank = _term_rank(key)
        _, title, explanation = _TERMS[rank] if rank < len(_TERMS) else ("", key, "A further term of the loss.")
        color = ORANGE if "equi" in key else BLUE
        panels.append(Panel(title, explanation, _line_figure([(title, steps, values)], colors=(color,))))
    return panels


def _psnr_panels(metrics: Metrics) -> list[Panel]:
    keys = sorted({key for line in metrics for key in line if key.startswith(_PSNR_PREFIX)})
    lines = [(f"image {key.removeprefix(_PSNR_PREFIX)}", *_series(metrics, key)) for key in keys]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return []
    explanation = (
        "Peak signal-to-noise ratio of each rebuilt image, in dB: higher is closer; +6 dB halves the pixel error."
    )
    return [Panel("Reconstruction quality", explanation, _line_figure(lines, colors=SERIES_COLORS))]


def _is_term(key: str) -> bool:
    return key not in TOTAL_LOSS_KEYS and (key.endswith("_loss") or key.startswith("loss/"))


def _term_rank(key: str) -> int:
    return next((rank for rank, (part, _, _) in enumerate(_TERMS) if part in key), len(_TERMS))


def _series(metrics: Metrics, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and finite values of `key`, both [n]."""
    points = [(line["iteration"], line[key]) for line in metrics if line.get(key) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return np.empty(0), np.empty(0)
    array = np.asarray(points, dtype=np.float64)  # [n, 2]
    return array[:, 0], array[:, 1]


def _line_figure(
    lines: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    *,
    colors: Sequence[str],
) -> Figure:
    """Return a chart of (label, steps, values) lines; noisy lines get a smooth one drawn over them."""
    figure, axes = plot_axes(4.4, 2.5)
    for (label, steps, values), color in zip(lines, _cycle(colors, len(lines)), strict=True):
        if len(steps) >= _MIN_POINTS_TO_SMOOTH:
            axes.plot(steps, values, color=color, alpha=0.28, linewidth=1)
            axes.plot(steps, _smooth(values), color=color, linewidth=2.2, label=label)
        else:
            marker = "o" if len(steps) == 1 else ""
            axes.plot(steps, values, color=color, linewidth=2.2, label=label, marker=marker)
    axes.set_xlabel("training step", color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)
    axes.yaxis.get_offset_text().set_color(INK)
    axes.margins(x=0.01)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    return figure


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred moving average of values [n] over about a twentieth of them; the ends use what is there."""
    width = max(3, len(values) // 20) | 1  # odd, so that the window has a centre
    kernel = np.ones(width)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    smoothed: NDArray[np.float64] = np.convolve(values, kernel, mode="same") / counts
    return smoothed


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[index % len(colors)] for index in range(count)]
