"""A disk whose calls fail one after the other while a checkpoint is saved."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.fault_campaigns.outcome import Outcome, fingerprint
from benchmarks.fault_campaigns.small_run import SmallRun
from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore
from dinov2_equi.fsdp.manifest import CheckpointError

OS_CALLS = ("open", "mkdir", "rename", "unlink", "rmdir", "fsync", "close")


class Killed(BaseException):
    """The process is gone: nothing may handle it and do more to the disk."""


@dataclass(frozen=True)
class Fault:
    """What happens at the chosen call.

    Attributes:
        name: for the table.
        code: of the OSError; None kills the process.
        done: share of the call that takes effect before: 0 nothing, 0.5 half of the bytes of a write, 1 all of it.
        lasts: whether all later calls fail as well.
    """

    name: str
    code: int | None
    done: float = 0.0
    lasts: bool = False

    def error(self) -> BaseException:
        """Return what to raise."""
        return Killed() if self.code is None else OSError(self.code, os.strerror(self.code))


FAULTS = (
    Fault("EIO", errno.EIO),
    Fault("EIO after half a write", errno.EIO, done=0.5),
    Fault("ENOSPC", errno.ENOSPC),
    Fault("ENOSPC from there on", errno.ENOSPC, done=0.5, lasts=True),
    Fault("EROFS", errno.EROFS),
    Fault("EROFS from there on", errno.EROFS, lasts=True),
    Fault("kill before the call", None, lasts=True),
    Fault("kill in the call", None, done=0.5, lasts=True),
    Fault("kill after the call", None, done=1.0, lasts=True),
)


class FaultyDisk:
    """Counts the calls of a save and lets the chosen one fail; `struck` is the name of the call it was.

    With `at_call` 0 none fails.
    """

    def __init__(self, fault: Fault, at_call: int) -> None:
        self.struck: str | None = None
        self._fault = fault
        self._at_call = at_call
        self.calls = 0

    def wrap(self, name: str, call: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Return `call` with the fault in it; `half` does a part of it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.struck is not None and self._fault.lasts and name != "close":
                raise self._fault.error()
            self.calls += 1
            if self.calls != self._at_call:
                return call(*args, **kwargs)
            self.struck = name
            if self._fault.done == 1:
                call(*args, **kwargs)
            elif self._fault.done > 0 and half is not None:
                half(*args, **kwargs)
            raise self._fault.error()

        return wrapped

    def wrap_open(self, path: Any, *args: Any, **kwargs: Any) -> _File:
        """Open a file whose reads and writes are calls as well."""
        return _File(self.wrap("open", io_open)(path, *args, **kwargs), self)


io_open = io.open


class _File:
    """A file object that asks the faulty disk before it reads or writes."""

    def __init__(self, file: Any, disk: FaultyDisk) -> None:
        self._file = file
        self.read = disk.wrap("read", file.read)
        self.write = disk.wrap("write", file.write, lambda data: file.write(data[: len(data) // 2]))
        self.flush = disk.wrap("write", file.flush)

    def fileno(self) -> int:
        return int(self._file.fileno())

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _half_save_file(tensors: dict[str, Any], path: Path) -> None:
    """Leave the first half of a file of tensors."""
    _save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


_save_file = checkpoint_module.save_file


@contextlib.contextmanager
def faulty_disk(fault: Fault, at_call: int) -> Iterator[FaultyDisk]:
    """Let the `at_call`-th call of the block fail. `save_file`, which writes from native code, counts as one write.

    The flush itself is left out: what the kernel has, a killed process does not lose.
    """
    disk = FaultyDisk(fault, at_call)
    with contextlib.ExitStack() as patches:
        for name in OS_CALLS:
            call = _no_flush if name == "fsync" else getattr(os, name)
            patches.enter_context(mock.patch.object(os, name, disk.wrap(name, call)))
        patches.enter_context(mock.patch.object(io, "open", disk.wrap_open))
        save_file = disk.wrap("write", _save_file, _half_save_file)
        patches.enter_context(mock.patch.object(checkpoint_module, "save_file", save_file))
        yield disk


def _no_flush(_: int) -> None:
    pass


@dataclass(frozen=True)
class _Saves:
    """A directory that holds the old checkpoint, and what is to be saved into a copy of it."""

    start: Path
    old: Checkpoint
    new: Checkpoint

    @functools.cached_property
    def allowed(self) -> dict[tuple[int, str], str]:
        """What may be found afterwards, by step and SHA-256: `old` or `new`."""
        return {
            (self.old.step, fingerprint(self.old.tensors)): "old",
            (self.new.step, fingerprint(self.new.tensors)): "new",
        }


def crash_points(run: SmallRun, folder: Path, count: int | None) -> Outcome:
    """Save the state of a run over and over, another call failing each time.

    Args:
        run: is stepped twice.
        folder: an empty one.
        count: number of cases, evenly spread; None for all.
    """
    outcome = Outcome("a new process loads the old or the new checkpoint, and saves again")
    store = CheckpointStore(folder / "old", keep=1)
    old = run.checkpoint(store)
    new = run.checkpoint(CheckpointStore(folder / "new"))
    same = Checkpoint(step=old.step, tensors=new.tensors, state=new.state, path=old.path)
    for saves in (_Saves(store.directory, old, new), _Saves(store.directory, old, same)):
        num_calls = _save(saves, FAULTS[0], 0, folder / "work")[0].calls
        cases = [(fault, call) for fault in FAULTS for call in range(1, num_calls + 1)]
        share = len(cases) if count is None else min(len(cases), -(-count // 2))
        for index in range(share):
            fault, call = cases[index * len(cases) // share]
            _one_case(saves, fault, call, folder / "work", outcome)
    return outcome


def _save(saves: _Saves, fault: Fault, call: int, work: Path) -> tuple[FaultyDisk, str]:
    """Save with a fault into a fresh copy; return the disk and how the save ended."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(saves.start, work)
    store = CheckpointStore(work, keep=1)
    with faulty_disk(fault, call) as disk:
        try:
            store.save(saves.new.step, saves.new.tensors, saves.new.state)
            end = "done"
        except CheckpointError:
            end = "refused"
        except Killed:
            end = "killed"
        except Exception as error:  # whatever else gets out is a finding
            end = f"{type(error).__name__}: {error}"
    return disk, end


def _one_case(saves: _Saves, fault: Fault, call: int, work: Path, outcome: Outcome) -> None:
    disk, end = _save(saves, fault, call, work)
    case = f"{fault.name} at call {call} ({disk.struck}), step {saves.old.step} to {saves.new.step}"
    if disk.struck is not None:
        outcome.count(f"failed_{disk.struck}")
        is_known = end in ("done", "refused", "killed")
        outcome.judge(case, _save_problem(saves, end, work, outcome) if is_known else f"the save ended in {end}")


def _save_problem(saves: _Saves, end: str, work: Path, outcome: Outcome) -> str | None:
    """Return how what lies on the disk breaks the promise, or None."""
    try:
        store = CheckpointStore(work, keep=1)  # as the next process opens it
        found = store.load()
        which = saves.allowed.get((found.step, fingerprint(found.tensors)))
        if which is None:
            return f"neither the old nor the new state was loaded, but one of step {found.step}"
        if end == "done" and which == "old":
            return "the save reported success, and the old state was loaded"
        outcome.count(f"loaded_the_{which}")
        if any(path.name.startswith(".") for path in work.iterdir()):
            return "leftovers of the crash were not cleared"
        store.save(saves.new.step + 1, saves.new.tensors, saves.new.state)
        return None if store.load().step == saves.new.step + 1 else "the save after it is not found"
    except (CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
