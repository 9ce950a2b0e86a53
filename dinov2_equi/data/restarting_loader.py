"""A loader that goes on when its processes are killed, with the batches that they would have given."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

MAX_DEATHS = 5
"""Deaths after which the loader gives up, as long as fewer than `SOUND_STEPS` batches lie between one and the next."""
SOUND_STEPS = 100
_PATIENCE_S = 1.0


class LoaderProcessError(OSError):
    """Loader processes are killed again and again: the message says how often, by what, and what to do."""


class _ProcessDiedError(Exception):
    """A process of the loader is gone; holds how it ended, in words."""


class RestartingLoader(Generic[Item]):
    """The batches of steps start_step .. start_step + num_steps - 1, through as many loaders as it takes.

    A batch must depend on its step alone. When a process dies, the others are ended too, and new ones go on with the
    first batch that was not delivered: none is lost and none comes twice. What the dead ones had ahead is made again.

    Args:
        make_loader: From (first step, number of steps) to a loader.
        start_step: First step.
        num_steps: Number of batches.

    Raises:
        LoaderProcessError: On iteration, after `MAX_DEATHS`.
    """

    def __init__(self, make_loader: Callable[[int, int], DataLoader[Item]], *, start_step: int, num_steps: int) -> None:
        self._make_loader = make_loader
        self._start_step = start_step
        self._num_steps = num_steps

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._num_steps

    def __iter__(self) -> Iterator[Item]:
        """Yield the batches."""
        done = deaths = since_death = 0
        while done < self._num_steps:
            try:
                for batch in _batches(self._make_loader(self._start_step + done, self._num_steps - done)):
                    done, since_death = done + 1, since_death + 1
                    yield batch
            except _ProcessDiedError as death:
                deaths = deaths + 1 if since_death < SOUND_STEPS else 1
                since_death = 0
                if deaths >= MAX_DEATHS:
                    raise LoaderProcessError(_last_words(deaths, str(death))) from None
                logger.warning("%s; the loader starts again at step %d", death, self._start_step + done)


def _batches(loader: DataLoader[Item]) -> Iterator[Item]:
    """Yield the batches of one loader; its processes end with the last one, or with the first error.

    Raises:
        _ProcessDiedError: One of its processes is gone; all of them are by then.
    """
    before = {process.pid for process in multiprocessing.active_children()}
    with _own_signal_handler():
        iterator = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process.pid not in before]
    try:
        for _ in range(len(loader)):
            try:
                with _watched(workers):
                    batch = next(iterator)
            except (RuntimeError, OSError, EOFError, _ProcessDiedError) as error:
                dead = _dead(workers, patience_s=0.0 if isinstance(error, RuntimeError) else _PATIENCE_S)
                if not dead:
                    raise
                raise _ProcessDiedError(_how_ended(dead[0])) from None
            yield batch
        for _ in iterator:  # there is none left, and the processes end
            raise AssertionError("more batches than the loader has said")
    finally:
        _end(workers)  # an error's traceback would keep them, and whoever waits for them at the end of the process


@contextlib.contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Undo what PyTorch does to SIGCHLD: its handler raises wherever the training happens to be, within a step too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def _watched(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Raise within the block as soon as a process is gone, also one that was gone before.

    Outside of the main thread PyTorch notices by itself, within five seconds.
    """

    def look(*_: Any) -> None:
        if not all(worker.is_alive() for worker in workers):
            raise _ProcessDiedError

    if not workers or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _own_signal_handler():
        signal.signal(signal.SIGCHLD, look)
        look()
        yield


def _dead(workers: Sequence[BaseProcess], patience_s: float) -> list[BaseProcess]:
    """Return the processes that are gone, at the latest so many seconds from now.

    A process that is killed while a batch is fetched from it breaks its connections a moment before it is gone.
    """
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], patience_s)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # its end is announced before the system knows how it ended
    return [worker for worker in workers if not worker.is_alive()]


def _end(workers: Sequence[BaseProcess]) -> None:
    """End processes that may wait for a lock of a dead one; they ignore gentler signals."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _how_ended(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    cause = f"was killed by signal {-code}" if code < 0 else f"ended by itself with exit code {code}"
    return f"loader process {worker.pid} {cause}"


def _last_words(deaths: int, last: str) -> str:
    return (
        f"loader processes died {deaths} times with fewer than {SOUND_STEPS} steps in between, the last: {last}. "
        "Signal 9 mostly means that the machine has not enough memory: lower train.num_workers or "
        "train.batch_size_per_gpu. The same command goes on from the last checkpoint"
    )
