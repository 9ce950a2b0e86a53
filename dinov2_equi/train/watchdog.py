"""An end to a run that hangs: the stacks of every process, and an exit code of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_HUNG = 124
"""What timeout(1) returns."""

_CHECKS_PER_LIMIT = 10
_LONGEST_CHECK_S = 1.0
_GRACE_S = 5.0
"""How long a process that gave up stays: the others, which wait for the same thing, write their stacks first."""
_STDERR = 2


class Watchdog:
    """Ends the process when nothing has happened for too long.

    Every process of a run has one. Where one process hangs, the others wait for it in the next exchange, so all of them
    notice at about the same time, each writes the stacks of its threads, and all end with `EXIT_HUNG`. Time in which
    the process was stopped (Ctrl-Z, a machine asleep) does not count.
    """

    def __init__(self, limit_s: float, output_dir: Path, rank: int = 0) -> None:
        """Watch nothing yet.

        Args:
            limit_s: seconds between two calls of `beat` that are too many; 0 never ends anything.
            output_dir: the run's folder.
            rank: number of this process.
        """
        self._limit_s = limit_s
        self._rank = rank
        self._file = stacks_file(output_dir, rank)
        self._doing = "starting"
        self._waited_s = 0.0
        self._is_paused = False
        self._over = threading.Event()

    def beat(self, doing: str) -> None:
        """Note that something happened, and what comes next, for instance `waiting for data`."""
        self._doing = doing
        self._waited_s = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing while the block lasts: the first process measures, and the others wait for it."""
        self._is_paused = True
        try:
            yield
        finally:
            self._waited_s = 0.0
            self._is_paused = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch while the block lasts."""
        if self._limit_s == 0:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        period = min(self._limit_s / _CHECKS_PER_LIMIT, _LONGEST_CHECK_S)
        before = time.monotonic()
        while not self._over.wait(period):
            now = time.monotonic()
            if not self._is_paused:
                self._waited_s += min(now - before, 2 * period)  # more passed only while this process stood still
            before = now
            if self._waited_s > self._limit_s:
                self._give_up()
                return

    def _give_up(self) -> None:
        message = (
            f"rank {self._rank}: nothing happened for {self._limit_s:g} s (train.watchdog_seconds) while "
            f"{self._doing}; where each thread stood, also in {self._file}:\n"
        )
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for target in (file.fileno(), _STDERR):
                os.write(target, message.encode())
                faulthandler.dump_traceback(target, all_threads=True)
        # Also where the main thread has gone on since, as it does with an error when another process has ended.
        time.sleep(_GRACE_S)
        os._exit(EXIT_HUNG)


def stacks_file(output_dir: Path, rank: int) -> Path:
    """Return where the stacks of a process that hung are written."""
    return output_dir / "logs" / f"stacks.rank{rank}.txt"
