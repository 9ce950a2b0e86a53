"""The report: every section, nothing from outside, honest sentences, and no way for text to become markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dinov2_equi.evaluation.pictures import pca_figure, reconstruction_figure
from dinov2_equi.evaluation.report import (
    ProbeComparison,
    ReportData,
    _duration,
    _memory,
    _number,
    render_report,
    write_report,
)
from dinov2_equi.evaluation.transform_regression import ProbeResult

VOID = {"meta", "link", "br", "img", "input", "hr"}
MINIMAL = ReportData(run_name="demo", metrics=[], config_yaml="a: 1", num_steps=10, duration_s=61.0, images_per_s=12.0)


def probe_result(r2: float, outputs: int = 1) -> ProbeResult:
    names = ("rotation_deg", "translation_x_px", "translation_y_px")[:outputs]
    targets = torch.linspace(-45, 45, 12)[:, None].repeat(1, outputs)
    return ProbeResult(r2, (r2,) * outputs, 0.9, 100, 12, 5, targets + 3, targets, names)


def comparison(before: float | None, after: float, outputs: int = 1) -> ProbeComparison:
    old = None if before is None else probe_result(before, outputs)
    return ProbeComparison("rotation", "class token", old, probe_result(after, outputs))


@pytest.fixture(scope="module")
def full() -> ReportData:
    steps = [{"iteration": i, "total_loss": 20.0 - i / 10, "equi_loss": 0.1, "lr": 1e-3} for i in range(100)]
    stack = torch.rand(2, 2, 3, 8, 8)
    return replace(
        MINIMAL,
        metrics=steps,
        num_steps=100,
        environment={"Device": "CPU <2 threads>"},
        peak_memory_bytes=3 * 2**29,
        num_images=1900,
        probes=[comparison(0.31, 0.87, outputs=3)],
        reconstruction=reconstruction_figure(stack[0], stack[1], stack, stack),
        pca=pca_figure(torch.rand(2, 3, 8, 8), {"after training": torch.rand(2, 2, 2, 3)}),
        files={"config.yaml": "every setting"},
        commands={"Go on": "make train"},
        notes=["a caveat"],
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_full_report_has_every_section_and_number(full: ReportData) -> None:
    page = Page(render_report(full))
    sections = [value for name, value in page.attributes if name == "id"]
    assert [s for s in sections if s in {"reconstruction", "features", "probes", "curves", "next", "details"}] == [
        "reconstruction", "features", "probes", "curves", "next", "details",
    ]  # fmt: skip
    text = " ".join(page.text.split())
    for words in ("0.87", "0.31", "1,900 images", "100 steps", "1 min 01 s", "1.5 GiB", "a caveat", "make train",
                  "CPU <2 threads>", "a: 1", "translation x", "off by 3.0°", "off by 3.0 px"):  # fmt: skip
        assert words in text, words


def test_the_page_loads_nothing_from_outside_and_runs_nothing(full: ReportData) -> None:
    html = render_report(full)
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:", "#")) for value in links)
    assert not re.search(r"@import|url\((?!#)", html)


def test_a_run_without_pictures_probes_or_metrics_still_has_a_report() -> None:
    page = Page(render_report(MINIMAL))
    assert "svg" not in page.tags
    assert "10 steps" in page.text
    assert "None" not in page.text and "nan" not in page.text


def test_text_of_the_user_never_becomes_markup(full: ReportData) -> None:
    attack = "<script>alert(1)</script>"
    page = Page(
        render_report(replace(full, run_name=attack, config_yaml=attack, notes=[attack], files={attack: attack}))
    )
    assert "script" not in page.tags
    assert page.text.count(attack) == 6  # title, heading, configuration, note, file and its meaning


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.31, 0.87, "better than before training: R² 0.87, from 0.31"),
        (0.50, 0.20, "worse than before training: R² 0.20, from 0.50"),
        (0.50, 0.51, "about as well as before training: R² 0.51"),
        (-2.0, -0.5, "cannot be read from its features: R² \N{MINUS SIGN}0.50"),
        (None, 0.87, "can be read from its features with R² 0.87"),
        (float("nan"), float("nan"), "cannot be read from its features: R² n/a"),
    ],
)
def test_the_summary_says_honestly_what_the_probe_found(before: float | None, after: float, words: str) -> None:
    html = render_report(replace(MINIMAL, probes=[comparison(before, after)]))
    assert words in html
    assert ('class="value good"' in html) == (before == 0.31)


def test_the_loss_is_said_to_fall_to_rise_or_to_stay() -> None:
    still = [{"iteration": i, "total_loss": 5.0 - 1e-6 * i} for i in range(5)]
    assert "stayed at 5.00" in render_report(replace(MINIMAL, metrics=still))
    falling = [{"iteration": i, "total_loss": 9.0 - i} for i in range(5)]
    assert "fell from 9.00 to 5.00" in render_report(replace(MINIMAL, metrics=falling))
    rising = [{"iteration": i, "total_loss": 5.0 + i} for i in range(5)]
    assert "rose from 5.00 to 9.00" in render_report(replace(MINIMAL, metrics=rising))


def test_the_probe_without_a_measurement_before_says_so() -> None:
    assert "not measured" in render_report(replace(MINIMAL, probes=[comparison(None, 0.5)]))


def test_bars_stay_between_nothing_and_full() -> None:
    html = render_report(replace(MINIMAL, probes=[comparison(-3.0, 0.5)]))
    assert re.findall(r"width:([\d.-]+)%", html) == ["0.0", "50.0"]


def test_the_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", MINIMAL)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (262, "4 min 22 s"), (3599.7, "1 h 00 min"), (93784, "26 h 03 min")],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (27.04, "27.0"), (1234.5, "1,234"), (0.01234, "0.0123"), (1.5e-7, "1.50e\N{MINUS SIGN}07"),
     (-0.5, "\N{MINUS SIGN}0.500"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert _number(value) == text


def test_memory_is_given_in_the_unit_that_suits_it() -> None:
    assert _memory(200 * 2**20) == ("200", "MiB")
    assert _memory(3 * 2**29) == ("1.5", "GiB")
