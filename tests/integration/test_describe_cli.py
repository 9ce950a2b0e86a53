"""`scripts/describe.py` as a user types it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "describe.py"
DEBUG_CONFIG = str(REPOSITORY / "configs" / "debug_cpu.yaml")
CONTROLS = REPOSITORY / "configs" / "controls"


@pytest.fixture(scope="module")
def describe() -> Iterator[ModuleType]:
    """Return the script as a module. Its path guard acts on a copy of the path."""
    before = sys.path
    sys.path = list(before)
    spec = importlib.util.spec_from_file_location("scripts_describe", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path = before


def test_script_cannot_be_started_from_another_folder(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start_python(str(SCRIPT), DEBUG_CONFIG, cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    for word in ("vit_test_tiny/8", "2 of 32", "backbone", "DINO head", "iBOT head", "split *", "decoder *", "teacher"):
        assert word in out
    assert "of the same step without it" in out


def test_several_files_and_overrides_are_read_in_their_order(
    describe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe.main([DEBUG_CONFIG, str(CONTROLS / "theta.yaml"), "crops.global_crops_size=40"]) == 0
    out = capsys.readouterr().out
    assert "theta regression *" in out and "decoder" not in out
    assert "2 of 40" in out


def test_run_without_a_branch_is_said_to_have_one(describe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([DEBUG_CONFIG, "equi.family=null", "equi.loss_weight=0"]) == 0
    out = capsys.readouterr().out
    assert "No equivariance branch" in out and "*" not in out


@pytest.mark.parametrize("word", ["equi.famly=se2", "no_such.yaml", "nonsense"])
def test_wrong_word_ends_in_one_line(describe: ModuleType, capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert describe.main([DEBUG_CONFIG, word]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert word.partition("=")[0] in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23 k"),
        (12_345, "12.3 k"),
        (999_400, "999 k"),
        (2.5e9, "2.50 G"),
        (3e15, "3000 T"),
    ],
)
def test_short_numbers(describe: ModuleType, number: float, text: str) -> None:
    assert describe.short(number) == text
