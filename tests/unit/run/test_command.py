"""How a command ends."""

from __future__ import annotations

import argparse

import pytest

from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.run.command import command_parser, run_command


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("no such name"), 2, "error: no such name\n"),
        (FileNotFoundError("no such file"), 2, "error: no such file\n"),
        (ImportError("pip install it"), 2, "error: pip install it\n"),
        (CheckpointError("damaged"), 2, "error: damaged\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_fault_of_the_input_ends_in_a_traceback(
    capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, message: str
) -> None:
    def command(args: argparse.Namespace) -> int:
        raise raised

    assert run_command(command, argparse.Namespace()) == code
    assert capsys.readouterr().err == message


def test_fault_of_ours_is_hidden() -> None:
    def command(args: argparse.Namespace) -> int:
        raise AssertionError

    with pytest.raises(AssertionError):
        run_command(command, argparse.Namespace(device="cpu"))


def test_help_breaks_the_lines_of_an_example() -> None:
    shown = command_parser("What it does.\n\n    python x.py --flag\n").format_help()
    assert "\n    python x.py --flag\n" in shown and "exit codes: 0 done" in shown
