"""What is measured again and again while a head is trained: kept in a file, drawn as a curve."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinov2_equi.evaluation.figures import INK, SERIES_COLORS, plot_axes
from dinov2_equi.evaluation.results import write_text_atomically

logger = logging.getLogger(__name__)

_STEP = "step"


class MeasuredCurve:
    """Numbers by the step after which they were measured; a training that was stopped goes on with them.

    The file is written at every measurement. What another training left in it is forgotten, and with a warning what is
    no such file.

    Args:
        path: the file, JSON.
        num_steps: of the whole training.
        training: what training and measurement depend on, as JSON.
    """

    def __init__(self, path: Path, num_steps: int, training: Mapping[str, Any]) -> None:
        self._path = path
        self._num_steps = num_steps
        self._training = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()
        self._entries = _read(path, self._training)

    def has(self, step: int) -> bool:
        """Return whether it was measured after `step` steps."""
        return any(entry[_STEP] == step for entry in self._entries)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep what was measured after `step` steps, NaN as null, and drop what was measured then or later before."""
        self._entries = [entry for entry in self._entries if entry[_STEP] < step]
        known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._entries.append({_STEP: step, **known})
        document = {"training": self._training, "entries": self._entries}
        write_text_atomically(self._path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def columns(self, last: Mapping[str, float] | None = None) -> dict[str, list[float]]:
        """Return the steps and the numbers measured after them, each as a list by its name.

        Args:
            last: what was measured after the last step; None: nothing was.
        """
        entries = [*self._entries, *([{_STEP: self._num_steps, **last}] if last is not None else [])]
        names = list(dict.fromkeys(name for entry in entries for name in entry))
        return {name: [_number(entry.get(name)) for entry in entries] for name in names}


def measured_figure(
    columns: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]], *, title: str
) -> Figure:
    """Return a figure of numbers in [0, 1] against steps, and the loss behind them on an axis of its own.

    Args:
        columns: `step` and what was measured after each, by name.
        losses: `step` and `loss`.
        title: above it.
    """
    figure, axes = plot_axes(6.4, 3.4)
    for name, color in zip((name for name in columns if name != _STEP), SERIES_COLORS, strict=False):
        axes.plot(columns[_STEP], columns[name], color=color, marker="o", markersize=4, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("steps", color=INK)
    axes.set_title(title, color=INK, fontsize=10)
    beside = axes.twinx()
    beside.plot(losses[_STEP], losses["loss"], color=INK, alpha=0.45, linewidth=1, label="training loss (right)")
    beside.set_ylim(bottom=0)
    beside.tick_params(colors=INK)
    beside.spines[:].set_visible(False)
    handles = [*axes.get_lines(), *beside.get_lines()]
    figure.legend(handles=handles, frameon=False, labelcolor=INK, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _read(path: Path, training: str) -> list[dict[str, Any]]:
    """Return the entries of a file; none where there is no file, or one of another training."""
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries = [{str(name): value for name, value in entry.items()} for entry in document["entries"]]
        steps = [entry[_STEP] for entry in entries]
        if steps != sorted(set(steps)):
            raise ValueError(f"its steps are {steps}")
        is_same = document["training"] == training
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s does not hold what was measured in training (%r), and is begun anew", path, error)
        return []
    return entries if is_same else []
