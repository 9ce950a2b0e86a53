"""Signals that ask a training to stop, and what its loader processes do with them."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""What schedulers send before they end a job, and Ctrl-C."""


def ignore_stop_signals() -> None:
    """Leave the decision to the training process: Ctrl-C and schedulers signal its loader processes as well."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_worker(_: int) -> None:
    """Ignore them from the start of a DataLoader's worker on; for its `worker_init_fn`."""
    ignore_stop_signals()
