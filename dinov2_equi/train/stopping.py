"""Stopping between two steps when the operating system, SLURM or a person asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dinov2_equi.data.signals import STOP_SIGNALS


class StopRequest:
    """Remembers that a stop was asked for; a second signal ends the process at once.

    Not so SIGTERM in a SLURM job. SLURM sends it twice in a row to one that is pre-empted, and at the end of its time
    after the signal that asked to save. It kills by itself, and until then (`KillWait`) the checkpoint may be written.

    Attributes:
        signal: number of the first signal, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over the handlers of `STOP_SIGNALS` while the block lasts; outside the main thread nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
                return
            os._exit(128 + number)  # nothing is half written: checkpoints appear by a rename
        self.signal = number
        # Not through logging: the signal may have come in the middle of a log line.
        message = f"\n{signal.Signals(number).name}: finishing this step, then saving. Again: stop at once.\n"
        os.write(2, message.encode())


class RunStopped(Exception):  # noqa: N818 - it is no error
    """A signal stopped the run after a whole step, and its checkpoint is written; or after what has no steps.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        where = "" if step is None else f" after step {step}, which is saved"
        super().__init__(f"stopped by {signal.Signals(number).name}{where}; the same command goes on")
        self.signal = number
