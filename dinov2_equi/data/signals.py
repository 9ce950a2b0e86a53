"""Signals that ask a training to stop, and what its loader processes do with them."""

from __future__ import annotations

import multiprocessing
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


def end_workers() -> None:
    """Kill the loader processes that still run when the process ends: a request they ignore, and Python waits for them.

    Something else, such as an error or a runner in a cycle of references, may have kept their loader until then.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises where a worker is killed
    for child in left:
        child.kill()
