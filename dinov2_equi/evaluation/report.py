"""The report of a run: one HTML file that explains itself and needs no other file, no script and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from dinov2_equi.evaluation.curves import Panel, total_loss_series, training_panels
from dinov2_equi.evaluation.figures import figure_svg
from dinov2_equi.evaluation.pictures import probe_figure
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.evaluation.transform_regression import ProbeResult

_TEMPLATE = "templates/report.html.j2"
_NOTABLE_R2_CHANGE = 0.02  # smaller ones are within what another seed of the probe gives


@dataclass(frozen=True)
class ProbeComparison:
    """One transform probe on the untrained and on the trained network, with the same pairs."""

    name: str
    """What is read back, for example "rotation"."""

    features: str
    """Which features were given to the probe, for example "class token + mean patch token"."""

    before: ProbeResult | None
    """The probe on the network as it was before training; None when it was not measured."""

    after: ProbeResult
    """The probe on the trained network."""

    images: str = ""
    """What the probe was trained and tested on, in words."""


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. Sections without data are left out."""

    run_name: str
    """Heading of the page."""

    metrics: Sequence[Mapping[str, float]]
    """Lines of training_metrics.json."""

    config_yaml: str
    """The resolved configuration."""

    num_steps: int
    """Optimiser steps taken."""

    duration_s: float
    """Wall-clock seconds of the training."""

    images_per_s: float
    """Training images a second, each with all its crops."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Rows of the environment table: torch, device, attention backend, ..."""

    peak_memory_bytes: int | None = None
    """Highest memory use: of the GPU on CUDA, of the process on a CPU."""

    num_images: int | None = None
    """Images in the training set."""

    probes: Sequence[ProbeComparison] = ()
    """Transform probes; the first one is the headline."""

    reconstruction: Figure | None = None
    """From `reconstruction_figure`."""

    pca: Figure | None = None
    """From `pca_figure`."""

    files: Mapping[str, str] = field(default_factory=dict)
    """File or folder of the run -> what it holds."""

    commands: Mapping[str, str] = field(default_factory=dict)
    """What to do next -> the command for it."""

    notes: Sequence[str] = ()
    """Warnings and caveats of this run, shown at the top."""


@dataclass(frozen=True)
class _Fact:
    """One headline number."""

    label: str
    value: str
    detail: str
    tone: str = ""  # CSS class of the value: "good" or nothing


def write_report(output_path: Path, data: ReportData) -> Path:
    """Write the report as one self-contained HTML file and return its path; missing folders are made."""
    write_text_atomically(output_path, render_report(data))
    return output_path


def render_report(data: ReportData) -> str:
    """Return the report as HTML text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_read_template())
    return template.render(
        data=data,
        summary=_summary(data),
        facts=_facts(data),
        panels=[_panel_fields(panel) for panel in training_panels(data.metrics)],
        reconstruction=_inline(data.reconstruction, "Views, targets and their reconstructions, one image a row"),
        pca=_inline(data.pca, "Photographs above their patch features shown as colours"),
        probe_rows=[row for probe in data.probes for row in _probe_rows(probe)],
        probe_plot=_probe_plot(data.probes),
    )


def _read_template() -> str:
    return (resources.files("dinov2_equi.evaluation") / _TEMPLATE).read_text(encoding="utf-8")


def _summary(data: ReportData) -> str:
    """Return the run in two or three plain sentences."""
    images = f" on {data.num_images:,} images" if data.num_images is not None else ""
    sentences = [
        f"A vision transformer learnt without labels for {data.num_steps:,} steps{images} "
        f"in {_duration(data.duration_s)}."
    ]
    ends = _loss_ends(data.metrics)
    if ends is not None:
        sentences.append(_loss_sentence(_number(ends[0]), _number(ends[1]), has_fallen=ends[1] < ends[0]))
    if data.probes:
        sentences.append(_probe_sentence(data.probes[0]))
    return " ".join(sentences)


def _loss_sentence(start: str, end: str, *, has_fallen: bool) -> str:
    if start == end:
        return f"Its loss stayed at {end}."
    return f"Its loss {'fell' if has_fallen else 'rose'} from {start} to {end}."


def _probe_sentence(probe: ProbeComparison) -> str:
    after = probe.after.r2_pooled
    subject = f"The {probe.name} of an image"
    if not after >= _NOTABLE_R2_CHANGE:  # NaN included
        return f"{subject} cannot be read from its features: R² {_r2(after)}, no better than guessing the average."
    if probe.before is None:
        return f"{subject} can be read from its features with R² {_r2(after)} (1 is perfect)."
    change = after - probe.before.r2_pooled
    if abs(change) < _NOTABLE_R2_CHANGE:
        return f"{subject} can be read from its features about as well as before training: R² {_r2(after)}."
    direction = "better" if change > 0 else "worse"
    values = f"R² {_r2(after)}, from {_r2(probe.before.r2_pooled)} (1 is perfect)"
    return f"{subject} can be read from its features {direction} than before training: {values}."


def _has_gained(probe: ProbeComparison) -> bool:
    """Return whether training made the parameters readable, or more so."""
    if probe.before is None or not probe.after.r2_pooled >= _NOTABLE_R2_CHANGE:
        return False
    return probe.after.r2_pooled - probe.before.r2_pooled >= _NOTABLE_R2_CHANGE


def _facts(data: ReportData) -> list[_Fact]:
    facts = []
    ends = _loss_ends(data.metrics)
    if ends is not None:
        facts.append(_Fact("Loss", _number(ends[1]), f"{_number(ends[0])} at the start"))
    for probe in data.probes[:1]:
        before = "of 1" if probe.before is None else f"{_r2(probe.before.r2_pooled)} before training"
        label = f"{probe.name.capitalize()} R²"
        facts.append(_Fact(label, _r2(probe.after.r2_pooled), before, "good" if _has_gained(probe) else ""))
    facts.append(_Fact("Speed", _number(data.images_per_s), "images a second"))
    facts.append(_Fact("Time", _duration(data.duration_s), f"{data.num_steps:,} steps"))
    if data.peak_memory_bytes is not None:
        value, unit = _memory(data.peak_memory_bytes)
        facts.append(_Fact("Memory", f"{value} {unit}", "at its peak"))
    return facts


def _panel_fields(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "explanation": panel.explanation,
        "svg": _inline(panel.figure, f"{panel.title} over training steps"),
    }


def _probe_rows(probe: ProbeComparison) -> list[dict[str, Any]]:
    """Return the table rows of a probe: all parameters together, then each one where there are several."""
    before, after = probe.before, probe.after
    num_outputs = len(after.r2_per_output)
    if num_outputs == 1:
        return [_probe_row(probe.name, probe.features, _cell(before, 0), _cell(after, 0))]
    rows = [_probe_row(probe.name, probe.features, _cell(before, None), _cell(after, None))]
    names = after.output_names or tuple(f"parameter {p + 1}" for p in range(num_outputs))
    rows += [_probe_row(_readable(name), "", _cell(before, p), _cell(after, p)) for p, name in enumerate(names)]
    return rows


def _probe_row(name: str, features: str, before: _Cell | None, after: _Cell | None) -> dict[str, Any]:
    return {"name": name, "features": features, "cells": [("before", before), ("after", after)]}


@dataclass(frozen=True)
class _Cell:
    """One R² in the table: its text, the length of its bar in percent, and the mean error where it has one unit."""

    text: str
    percent: float
    error: str


def _cell(result: ProbeResult | None, output: int | None) -> _Cell | None:
    """Return the cell of parameter `output`, or of all together for None; None where nothing was measured."""
    if result is None:
        return None
    if output is None:
        return _Cell(_r2(result.r2_pooled), _percent(result.r2_pooled), "")
    r2 = result.r2_per_output[output]
    unit = _unit(result.output_names[output]) if result.output_names else ""
    return _Cell(_r2(r2), _percent(r2), f"off by {_number(result.mean_absolute_errors[output], digits=2)}{unit}")


def _readable(name: str) -> str:
    """Return a parameter's name as words, "translation_x_px" as "translation x"."""
    return name.removesuffix("_deg").removesuffix("_px").replace("_", " ")


def _unit(name: str) -> str:
    """Return the unit that a parameter's name ends in, ready to follow a number."""
    return {"deg": "°", "px": " px"}.get(name.rsplit("_", 1)[-1], "")


def _probe_plot(probes: Sequence[ProbeComparison]) -> dict[str, Any] | None:
    if not probes:
        return None
    probe = probes[0]
    name = (probe.after.output_names or (probe.name,))[0]
    figure = probe_figure(probe.before, probe.after)
    return {
        "svg": _inline(figure, f"True against predicted {_readable(name)}"),
        "quantity": _readable(name),
        "unit": {"°": "degrees", " px": "pixels"}.get(_unit(name), ""),
        "result": probe.after,
    }


def _inline(figure: Figure | None, description: str) -> Markup | None:
    """Return a figure as SVG that the template may place as it is: it is drawn here, not taken from a user."""
    return None if figure is None else Markup(figure_svg(figure, description))


def _loss_ends(metrics: Sequence[Mapping[str, float]]) -> tuple[float, float] | None:
    """Return the loss at the start and at the end, each averaged over a twentieth of the logged values."""
    _, values = total_loss_series(metrics)
    if len(values) < 2:
        return None
    width = max(1, len(values) // 20)
    return float(np.mean(values[:width])), float(np.mean(values[-width:]))


def _r2(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _percent(r2: float) -> float:
    """Return the length of an R² bar: 0 for "no better than the average" and below, 100 for perfect."""
    return 0.0 if math.isnan(r2) else 100 * min(max(r2, 0.0), 1.0)


def _number(value: float, digits: int = 3) -> str:
    """Return so many significant digits, without an exponent for ordinary sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}" if decimals <= 5 else f"{value:.{digits - 1}e}"
    return text.replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _memory(num_bytes: int) -> tuple[str, str]:
    gibibytes = num_bytes / 2**30
    return (f"{gibibytes:.1f}", "GiB") if gibibytes >= 1 else (f"{num_bytes / 2**20:.0f}", "MiB")
