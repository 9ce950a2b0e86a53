"""Where log records go: a console for people, a file for every rank."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.logging import RichHandler

from dinov2_equi.logging.console import get_console, is_interactive

_PLAIN_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s:%(lineno)d %(message)s"
_OWN_LOGGERS = ("dinov2_equi", "__main__")
_HANDLER_NAME_PREFIX = "dinov2_equi."


class _OwnRecordsOrWarnings(logging.Filter):
    """Let through our own records and everybody's warnings; libraries' chatter stays in the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is meant for the console."""
        return record.levelno >= logging.WARNING or record.name.split(".", 1)[0] in _OWN_LOGGERS


def log_file(output_dir: Path | str, rank: int) -> Path:
    """Return the log file of a rank: ``logs/log.txt`` for rank 0, ``logs/log.txt.rank<n>`` for the others."""
    return Path(output_dir) / "logs" / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")


def setup_logging(output_dir: Path | str, rank: int = 0, level: int | str = logging.INFO) -> None:
    """Send log records to the console (rank 0 only) and append them to the rank's file under ``output_dir``.

    The console is colourful on a terminal and gets plain lines otherwise. Python warnings are logged too. Handlers
    of an earlier call are replaced, those of others (such as a test runner) stay.

    Args:
        output_dir: the run's folder; ``logs/`` is made inside.
        rank: this process's rank.
        level: least level that is logged.
    """
    file = log_file(output_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    _remove_own_handlers(root)
    handlers = [_file_handler(file)] + ([_console_handler()] if rank == 0 else [])
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def _remove_own_handlers(root: logging.Logger) -> None:
    for handler in list(root.handlers):
        if (handler.name or "").startswith(_HANDLER_NAME_PREFIX):
            root.removeHandler(handler)
            handler.close()


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.name = f"{_HANDLER_NAME_PREFIX}file"
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    return handler


def _console_handler() -> logging.Handler:
    handler: logging.Handler
    console = get_console()
    if is_interactive(console):
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]", rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(_PLAIN_FORMAT, datefmt="%H:%M:%S"))
    handler.name = f"{_HANDLER_NAME_PREFIX}console"
    handler.addFilter(_OwnRecordsOrWarnings())
    return handler
