"""Loader processes that are killed: the batches stay what they are, and the training hears of it in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dinov2_equi.data import restarting_loader
from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.loaders import make_train_loader
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.restarting_loader import LoaderProcessError, RestartingLoader


def loader(num_workers: int = 2, num_steps: int = 12) -> RestartingLoader[Batch]:
    made = make_train_loader(
        dataset=SyntheticImages(7, (24, 32)),
        augmentation=DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8),
        mask_generator=MaskingGenerator((4, 4)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        batch_size=3,
        num_workers=num_workers,
        seed=5,
        start_step=4,
        num_steps=num_steps,
    )
    assert len(made) == num_steps
    return made  # type: ignore[return-value]


def kill_one() -> None:
    process = multiprocessing.active_children()[-1]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    assert multiprocessing.active_children() == [] and signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("kill_after", [(0,), (5,), (2, 3, 8)])
def test_killed_processes_lose_or_double_samples(kill_after: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    batches = []
    for batch in loader():
        batches.append(batch)
        if len(batches) - 1 in kill_after:
            kill_one()
    for one, other in zip(batches, loader(num_workers=0), strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name
    assert len(caplog.records) == len(kill_after)
    assert "was killed by signal 9; the loader starts again at step" in caplog.text


class _Breaking:
    """The batches of a loader until the connection to its process breaks, a moment before the process is gone."""

    def __init__(self, batches: Iterator[Batch], good: int) -> None:
        self.batches, self.good = batches, good

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.good -= 1
        if self.good >= 0:
            return next(self.batches)
        process = multiprocessing.active_children()[-1].pid
        assert process is not None
        threading.Timer(0.2, os.kill, (process, signal.SIGKILL)).start()
        raise ConnectionResetError(104, "Connection reset by peer")


def test_process_that_is_killed_while_a_batch_is_fetched_from_it_ends_the_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restarting_loader, "_PATIENCE_S", 60.0)  # on a busy machine
    made = iter((3, 99))  # good batches of the first loader, and of the one after it
    start = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: _Breaking(start(self), next(made)))
    batches = list(loader(num_workers=1))
    assert [batch.positions[0].item() for batch in batches] == list(range(12, 48, 3))
    assert "was killed by signal 9; the loader starts again at step 7" in caplog.text


class _Steps(Dataset[int]):
    """Numbers; at some of them the process is killed, the first `times` times."""

    def __init__(self, marks: Path, fatal: int, times: int) -> None:
        self.marks, self.fatal, self.times = marks, fatal, times

    def __getitem__(self, number: int) -> int:
        deaths = len(list(self.marks.iterdir()))
        if number == self.fatal and deaths < self.times:
            (self.marks / str(deaths)).touch()
            time.sleep(0.1)  # the training waits by then
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def numbers(marks: Path, fatal: int, times: int, num_steps: int = 8) -> RestartingLoader[int]:
    def make(first: int, count: int) -> DataLoader[int]:
        steps = _Steps(marks, fatal, times)
        return DataLoader(steps, batch_size=None, sampler=range(first, first + count), num_workers=1)

    return RestartingLoader(make, start_step=0, num_steps=num_steps)


def test_death_while_the_training_waits_is_noticed_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    assert list(numbers(tmp_path, 5, 1)) == list(range(8))
    assert time.perf_counter() - started < 4  # PyTorch looks every 5 s


def test_image_that_kills_its_process_every_time_ends_in_a_message(tmp_path: Path) -> None:
    got = []
    with pytest.raises(LoaderProcessError, match=r"died 5 times.*killed by signal 9.*lower train.num_workers"):
        for number in numbers(tmp_path, 3, 99):
            got.append(number)
    assert got == [0, 1, 2] and len(list(tmp_path.iterdir())) == restarting_loader.MAX_DEATHS


def test_deaths_long_after_each_other_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarting_loader, "SOUND_STEPS", 3)
    monkeypatch.setattr(restarting_loader, "MAX_DEATHS", 2)
    got = []
    for number, batch in enumerate(loader(num_workers=1)):
        got.append(batch.positions[0].item())
        if number in (0, 4, 8):
            kill_one()
    assert got == list(range(12, 48, 3))


@pytest.mark.parametrize("act", [lambda: time.sleep(0.05), lambda: sum(range(10**6))])
def test_death_within_a_step_is_raised_in_the_midst_of_it(act: Callable[[], None]) -> None:
    for number, _ in enumerate(loader(num_steps=3)):
        if number == 0:
            kill_one()
            act()


def test_an_error_in_a_process_is_taken_for_a_death(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Dataset[int]):
        def __getitem__(self, number: int) -> int:
            raise RuntimeError("a fault of the data set")

    def make(first: int, count: int) -> DataLoader[int]:
        return DataLoader(Faulty(), batch_size=None, sampler=range(first, first + count), num_workers=1)

    loaded = RestartingLoader(make, start_step=0, num_steps=2)
    with pytest.raises(RuntimeError, match="a fault of the data set") as caught:
        list(loaded)
    assert "starts again" not in caplog.text
    # The traceback is still there; it must not keep the process, for which the end of this one would wait for ever.
    assert caught.tb is not None and multiprocessing.active_children() == []
