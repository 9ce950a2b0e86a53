"""How a command ends."""

from __future__ import annotations

import argparse
import atexit
import signal
from collections.abc import Callable

import pytest
import torch

from dinov2_equi.data.signals import end_workers
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.run.command import command_parser, run_command
from dinov2_equi.train.stopping import RunStopped


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("no such name"), 2, "error: no such name\n"),
        (FileNotFoundError("no such file"), 2, "error: no such file\n"),
        (ImportError("pip install it"), 2, "error: pip install it\n"),
        (CheckpointError("damaged"), 2, "error: damaged\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            RunStopped(signal.SIGINT, 7),
            130,
            "stopped by SIGINT after step 7, which is saved; the same command goes on\n",
        ),
        (RunStopped(signal.SIGTERM), 75, "stopped by SIGTERM; the same command goes on\n"),
    ],
)
def test_fault_of_the_input_ends_in_a_traceback(
    capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, message: str
) -> None:
    def command(args: argparse.Namespace) -> int:
        raise raised

    assert run_command(command, argparse.Namespace()) == code
    assert capsys.readouterr().err == message


def out_of_memory_of_the_machine() -> None:
    torch.empty(2**62, dtype=torch.uint8)  # an exbibyte is more than any machine gives


def out_of_memory_of_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def out_of_memory_of_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "fill", [out_of_memory_of_the_machine, out_of_memory_of_a_device, out_of_memory_of_python], ids=lambda f: f.__name__
)
def test_too_little_memory_ends_in_a_traceback(capsys: pytest.CaptureFixture[str], fill: Callable[[], None]) -> None:
    def command(args: argparse.Namespace) -> int:
        fill()
        return 0

    assert run_command(command, argparse.Namespace()) == 2
    error = capsys.readouterr().err
    assert "not enough memory: take smaller batches" in error and error.count("\n") == 1


def test_fault_of_ours_is_hidden() -> None:
    def command(args: argparse.Namespace) -> int:
        raise AssertionError

    with pytest.raises(AssertionError):
        run_command(command, argparse.Namespace(device="cpu"))
    with pytest.raises(RuntimeError, match="tensor size"):
        run_command(lambda args: int(torch.ones(2) @ torch.ones(3)), argparse.Namespace())


def test_help_breaks_the_lines_of_an_example() -> None:
    shown = command_parser("What it does.\n\n    python x.py --flag\n").format_help()
    assert "\n    python x.py --flag\n" in shown and "exit codes: 0 done" in shown


def test_command_leaves_loader_processes_that_keep_it_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", lambda _: at_exit.clear())
    for _ in range(2):
        assert run_command(lambda _: 0, argparse.Namespace()) == 0
    assert at_exit == [end_workers]
