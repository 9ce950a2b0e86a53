"""Signals ask for a stop; the second one does not ask."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from dinov2_equi.data.signals import STOP_SIGNALS, ignore_stop_signals
from dinov2_equi.train.stopping import RunStopped, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_the_process_or_is_forgotten(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert signal.getsignal(number) is before
    assert number.name in capfd.readouterr().err


def in_a_child(*numbers: int, ignoring: bool = False) -> int:
    """Send signals to a forked process that listens, and return its exit code."""
    child = os.fork()
    if child == 0:
        with StopRequest().listening():
            if ignoring:
                ignore_stop_signals()
            for number in numbers:
                os.kill(os.getpid(), number)
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_second_signal_is_not_obeyed_at_once() -> None:
    assert in_a_child(signal.SIGTERM) == 7
    assert in_a_child(signal.SIGTERM, signal.SIGINT) == 128 + signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_preempted_job_is_killed_by_its_second_sigterm_before_it_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert in_a_child(signal.SIGTERM, signal.SIGTERM) == 7
    assert in_a_child(signal.SIGUSR2, signal.SIGTERM) == 7
    assert in_a_child(signal.SIGTERM, signal.SIGUSR1) == 128 + signal.SIGUSR1
    monkeypatch.delenv("SLURM_JOB_ID")
    assert in_a_child(signal.SIGTERM, signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_loader_process_is_ended_by_what_its_training_was_sent() -> None:
    assert in_a_child(*STOP_SIGNALS, *STOP_SIGNALS, ignoring=True) == 7


def test_another_thread_cannot_listen_and_says_nothing() -> None:
    caught: list[BaseException] = []

    def listen() -> None:
        try:
            with StopRequest().listening() as stop:
                assert stop.signal == 0
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not caught


def test_message_names_signal_and_step() -> None:
    assert "SIGUSR1 after step 12" in str(RunStopped(signal.SIGUSR1, 12))
