"""Saves in the background: what is written, what is waited for, and who learns of an error."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.fsdp.manifest import CheckpointError


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return what holds every write of tensors back until it is set."""
    event = threading.Event()
    save_file = checkpoint_module.save_file

    def held(*arguments: Any, **options: Any) -> None:
        assert event.wait(10)
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint_module, "save_file", held)
    yield event
    event.set()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def fill(is_full: bool) -> None:
        monkeypatch.undo()
        if is_full:
            monkeypatch.setattr(checkpoint_module, "save_file", no_space)

    return fill


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_changes_after_the_call_is_written(tmp_path: Path, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path)
    weight = torch.zeros(3)
    store.save(1, {"t": {"x": weight, "half": torch.ones(2).half()}}, {"a": 1}, in_background=True)
    weight.fill_(7)
    assert store.steps() == [] and not store.has_failed
    gate.set()
    store.wait()
    loaded = store.load()
    assert loaded.tensors["t"]["x"].tolist() == [0, 0, 0]
    assert loaded.tensors["t"]["half"].dtype == torch.float16
    assert loaded.state == {"a": 1}


def test_two_are_on_their_way(tmp_path: Path, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path)
    weight = torch.ones(3)
    store.save(1, {"t": {"x": weight}}, {}, in_background=True)
    second = threading.Thread(target=lambda: store.save(2, {"t": {"x": weight * 2}}, {}, in_background=True))
    second.start()
    second.join(0.05)
    assert second.is_alive()  # it waits for the first
    gate.set()
    second.join(10)
    store.wait()
    assert [store.load(step).tensors["t"]["x"].tolist() for step in (1, 2)] == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize("call", ["wait", "load", "save", "save in the background"])
def test_an_error_is_lost_or_told_twice(
    tmp_path: Path, states: Any, full_disk: Callable[[bool], None], call: str
) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1)
    full_disk(True)
    store.save(2, states.tensors(2), states.state(2), in_background=True)
    assert store._job is not None
    store._job._thread.join(10)
    assert store.has_failed
    full_disk(False)
    calls: dict[str, Callable[[], object]] = {
        "wait": store.wait,
        "load": store.load,
        "save": lambda: states.save(store, 3),
        "save in the background": lambda: store.save(3, states.tensors(3), {}, in_background=True),
    }
    with pytest.raises(CheckpointError, match="step 2 could not be written .*No space left"):
        calls[call]()
    assert not store.has_failed
    store.wait()
    assert states.is_of(store.load(), 1)
    assert not list(tmp_path.glob(".*"))
    states.save(store, 4)
    assert states.is_of(store.load(), 4)


def test_the_end_of_a_run_leaves_a_checkpoint_behind(tmp_path: Path, states: Any, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.waiting_at_the_end():
        store.save(1, states.tensors(1), states.state(1), in_background=True)
        gate.set()
        raise KeyboardInterrupt
    assert states.is_of(CheckpointStore(tmp_path, read_only=True).load(), 1)


def test_the_error_of_a_run_is_hidden_by_that_of_its_save(
    tmp_path: Path, states: Any, full_disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    full_disk(True)
    with pytest.raises(KeyboardInterrupt), store.waiting_at_the_end():
        store.save(1, states.tensors(1), states.state(1), in_background=True)
        raise KeyboardInterrupt
    assert "No space left" in caplog.text
    with pytest.raises(CheckpointError, match="No space left"), store.waiting_at_the_end():
        store.save(1, states.tensors(1), states.state(1), in_background=True)
