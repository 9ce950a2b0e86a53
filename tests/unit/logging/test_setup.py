"""Which records reach the console and which file, on which rank."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2_equi.logging import setup
from dinov2_equi.logging.setup import log_file, setup_logging


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def own_handlers() -> list[str]:
    names = [handler.name or "" for handler in logging.getLogger().handlers]
    return sorted(name for name in names if name.startswith("dinov2_equi."))


def test_main_rank_writes_to_console_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("dinov2_equi.train").info("step %d", 7)
    assert "INFO    step 7" in capsys.readouterr().out
    assert "INFO    dinov2_equi.train:" in (tmp_path / "logs" / "log.txt").read_text()


def test_other_ranks_write_to_their_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, rank=3)
    logging.getLogger("dinov2_equi.train").warning("slow")
    assert capsys.readouterr().out == ""
    assert "slow" in log_file(tmp_path, 3).read_text()
    assert log_file(tmp_path, 3).name == "log.txt.rank3"
    assert not log_file(tmp_path, 0).exists()


def test_a_second_call_does_not_double_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "first")
    setup_logging(tmp_path / "second")
    logging.getLogger("dinov2_equi").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert "once" not in log_file(tmp_path / "first", 0).read_text()
    assert own_handlers() == ["dinov2_equi.console", "dinov2_equi.file"]


def test_handlers_of_others_stay(tmp_path: Path) -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    setup_logging(tmp_path)
    setup_logging(tmp_path)
    assert other in logging.getLogger().handlers


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for text in ("first run", "second run"):
        setup_logging(tmp_path)
        logging.getLogger("dinov2_equi").info(text)
    content = log_file(tmp_path, 0).read_text()
    assert content.index("first run") < content.index("second run")


def test_chatter_of_libraries_stays_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("matplotlib.font_manager").info("chatter")
    logging.getLogger("matplotlib.font_manager").warning("trouble")
    console = capsys.readouterr().out
    assert "chatter" not in console
    assert "trouble" in console
    assert "chatter" in log_file(tmp_path, 0).read_text()


def test_a_script_run_by_its_path_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("__main__").info("hello")
    assert "hello" in capsys.readouterr().out


def test_level_is_respected(tmp_path: Path) -> None:
    setup_logging(tmp_path, level="WARNING")
    logging.getLogger("dinov2_equi").info("quiet")
    assert "quiet" not in log_file(tmp_path, 0).read_text()


def test_python_warnings_are_logged(tmp_path: Path) -> None:
    setup_logging(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # bind to the hook that is in place inside this block
        logging.captureWarnings(True)
        warnings.warn("deprecated thing", stacklevel=1)
        logging.captureWarnings(False)
    assert "deprecated thing" in log_file(tmp_path, 0).read_text()


def test_terminal_gets_the_rich_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "is_interactive", lambda console: True)
    setup_logging(tmp_path)
    console = next(h for h in logging.getLogger().handlers if h.name == "dinov2_equi.console")
    assert type(console).__name__ == "RichHandler"
