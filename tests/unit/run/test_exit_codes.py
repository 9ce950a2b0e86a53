"""What the exit codes mean is said once, in the code; help and documentation repeat it."""

from __future__ import annotations

import re
from pathlib import Path

from dinov2_equi.run.exit_codes import MEANINGS
from dinov2_equi.run.train import get_parser

RUN_FOLDER = Path(__file__).resolve().parents[3] / "docs" / "run_folder.md"


def test_the_documentation_says_something_else_about_an_exit_code() -> None:
    text = RUN_FOLDER.read_text(encoding="utf-8")
    _, _, table = text.partition("| exit code of `run/train.py` | |")
    documented = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)}
    assert documented == MEANINGS


def test_the_help_keeps_exit_codes_for_itself() -> None:
    shown = get_parser().format_help()
    assert "exit codes:" in shown
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^  {code} +{re.escape(meaning.replace('`', ''))}$", shown, re.MULTILINE), code
