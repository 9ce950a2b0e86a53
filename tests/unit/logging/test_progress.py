"""What the progress display says, with a clock that the test turns."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from rich.console import Console

from dinov2_equi.logging.console import get_console, is_interactive
from dinov2_equi.logging.progress import TrainingProgress, format_duration, format_losses, training_progress

PlainProgressFactory = Callable[..., AbstractContextManager[TrainingProgress]]


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def plain(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> PlainProgressFactory:
    caplog.set_level(logging.INFO, logger="dinov2_equi.logging.progress")
    console = Console(file=io.StringIO(), force_terminal=False)
    return lambda *args, **kwargs: training_progress(*args, console=console, clock=clock, **kwargs)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_losses_are_shown_total_first_and_nothing_else() -> None:
    scalars = {"lr": 1e-3, "dino_local_crops_loss": 1.23456, "koleo_loss": torch.tensor(-0.5), "total_loss": 12345.678}
    assert format_losses(scalars) == "total 1.235e+04  dino_local 1.235  koleo -0.5"
    assert format_losses({"lr": 1e-3}) == ""


def test_plain_lines_come_every_five_seconds_and_at_the_end(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(12) as progress:
        for step in range(12):
            clock.now += 1.0
            progress.update(step + 1, {"total_loss": float(step)})
    assert [message.split("  ")[0] for message in caplog.messages] == ["step 5/12", "step 10/12", "step 12/12"]
    assert caplog.messages[-1] == "step 12/12  total 11  1.00 steps/s  ETA 0:00"


def test_the_end_is_not_said_twice(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(1) as progress:
        clock.now += 6.0
        progress.update(1)
    assert len(caplog.messages) == 1


def test_nothing_done_says_nothing(plain: PlainProgressFactory, caplog: pytest.LogCaptureFixture) -> None:
    with plain(10, 10):
        pass
    assert caplog.messages == []


def test_images_per_second_and_time_left_count_from_the_resume(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(1000, 900, images_per_step=32) as progress:
        clock.now += 5.0
        progress.update(910)
    assert caplog.messages == ["step 910/1000  64.0 images/s  ETA 0:45"]


def test_a_slow_start_is_forgotten(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(200) as progress:
        clock.now += 500.0
        for step in range(100):
            clock.now += 1.0
            progress.update(step + 1)
    assert caplog.messages[-1] == "step 100/200  1.00 steps/s  ETA 1:40"


def test_losses_stay_until_new_ones_come(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(2) as progress:
        progress.update(1, {"total_loss": 3.0})
        clock.now += 6.0
        progress.update(2)
    assert "total 3" in caplog.messages[0]


def test_a_clock_that_stands_still_does_not_divide_by_zero(
    plain: PlainProgressFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with plain(2) as progress:
        progress.update(1)
    assert caplog.messages == ["step 1/2"]


def test_a_failing_run_still_says_how_far_it_came(
    plain: PlainProgressFactory, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError), plain(10) as progress:
        clock.now += 1.0
        progress.update(1)
        raise RuntimeError
    assert caplog.messages[-1].startswith("step 1/10")


def test_terminal_shows_bar_losses_and_speed(clock: FakeClock) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with training_progress(4, images_per_step=8, console=console, clock=clock) as progress:
        clock.now += 2.0
        progress.update(1, {"total_loss": 1.5, "equi_loss": 0.25})
    text = screen.getvalue()
    assert "step 1/4" in text
    assert "4.0 images/s  ETA 0:06" in text
    assert "total 1.5  equi 0.25" in text


def test_terminal_is_given_back_after_a_failure(clock: FakeClock) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with pytest.raises(RuntimeError), training_progress(4, console=console, clock=clock):
        raise RuntimeError
    hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().rindex(show_cursor) > screen.getvalue().rindex(hide_cursor)


def test_dumb_terminals_and_files_are_not_interactive() -> None:
    assert not is_interactive(Console(file=io.StringIO()))
    assert not is_interactive(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}))
    assert is_interactive(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}))


def test_log_lines_and_progress_share_one_console() -> None:
    assert get_console() is get_console()
