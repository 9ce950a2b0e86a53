"""The one console that log lines and the progress display share, so that they do not write over each other."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def get_console() -> Console:
    """Return the console on standard output, the same one at every call."""
    return Console()


def is_interactive(console: Console) -> bool:
    """Return whether ``console`` is a terminal that can redraw a line."""
    return console.is_terminal and not console.is_dumb_terminal
