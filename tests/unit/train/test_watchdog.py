"""A run that hangs ends, one that works or was put to sleep does not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2_equi.train import watchdog as module
from dinov2_equi.train.watchdog import EXIT_HUNG, Watchdog, stacks_file

LIMIT_S = 0.2


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the exit codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(module, "_GRACE_S", 0.1)
    monkeypatch.setattr(os, "_exit", codes.append)
    yield codes


def test_a_hung_step_goes_on_for_ever(tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog(LIMIT_S, tmp_path, rank=3).watching() as watchdog:
        watchdog.beat("in step 7")
        time.sleep(3 * LIMIT_S)
    assert ended == [EXIT_HUNG]
    text = stacks_file(tmp_path, 3).read_text()
    assert text.startswith("rank 3: nothing happened for 0.2 s (train.watchdog_seconds) while in step 7;")
    assert "test_a_hung_step_goes_on_for_ever" in text
    assert "test_a_hung_step_goes_on_for_ever" in capfd.readouterr().err


def test_a_run_folder_that_cannot_be_written_to_keeps_the_hung_run_alive(
    tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with Watchdog(LIMIT_S, tmp_path).watching():
        time.sleep(3 * LIMIT_S)
    assert ended == [EXIT_HUNG]
    shown = capfd.readouterr().err
    assert "nothing happened for 0.2 s" in shown and "could not be written" in shown


def test_a_file_system_that_hangs_keeps_the_hung_run_alive(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    (tmp_path / "logs").mkdir()  # for the thread that is released, which would complain after the test
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: released.wait(10))
    with Watchdog(LIMIT_S, tmp_path).watching():
        time.sleep(3 * LIMIT_S)
        assert ended == [EXIT_HUNG]
    released.set()


def test_steps_that_are_each_short_are_taken_for_a_hang(tmp_path: Path, ended: list[int]) -> None:
    with Watchdog(LIMIT_S, tmp_path).watching() as watchdog:
        for step in range(12):
            watchdog.beat(f"in step {step}")
            time.sleep(LIMIT_S / 5)
    assert ended == [] and not stacks_file(tmp_path, 0).exists()


def test_a_long_evaluation_is_taken_for_a_hang(tmp_path: Path, ended: list[int]) -> None:
    with Watchdog(LIMIT_S, tmp_path).watching() as watchdog:
        with watchdog.paused():
            time.sleep(2 * LIMIT_S)
        assert ended == []
        time.sleep(2 * LIMIT_S)
    assert ended == [EXIT_HUNG]


def test_sleep_of_the_machine_is_taken_for_a_hang(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watchdog(LIMIT_S, tmp_path).watching() as watchdog:
        watchdog.beat("in step 0")
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)
        time.sleep(LIMIT_S / 2)
    assert ended == []


def test_a_limit_of_zero_ends_the_run(tmp_path: Path, ended: list[int]) -> None:
    threads = threading.active_count()
    with Watchdog(0, tmp_path).watching():
        assert threading.active_count() == threads
    assert ended == []


def test_an_error_after_the_end_of_another_process_hides_the_hang(tmp_path: Path, ended: list[int]) -> None:
    with pytest.raises(RuntimeError), Watchdog(LIMIT_S, tmp_path).watching():
        time.sleep(1.5 * LIMIT_S)
        raise RuntimeError("connection closed by peer")
    assert ended == [EXIT_HUNG]
