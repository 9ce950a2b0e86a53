"""Loader processes ignore the signals that ask a training to stop, and still end with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from dinov2_equi.data import signals


@pytest.fixture
def handler_kept() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_process_waits_for_a_loader_process_for_ever(monkeypatch: pytest.MonkeyPatch, handler_kept: None) -> None:
    others = multiprocessing.active_children()
    batches = iter(DataLoader(range(9), num_workers=1, worker_init_fn=signals.start_worker))  # type: ignore[arg-type]
    next(batches)
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [worker])
    worker.terminate()  # what Python does at exit, before it waits
    worker.join(0.2)
    assert worker.is_alive()
    signals.end_workers()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL
    del batches  # before PyTorch's handler, which raises where a worker was killed, is back
