"""Runs of the training command on `configs/debug_cpu.yaml`: inside this process where possible, since an interpreter
takes seconds to start and such a run takes one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.fsdp.checkpoint import CheckpointStore, sha256_of_tensors
from dinov2_equi.run.train import main
from dinov2_equi.train import guard
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import train_step

REPOSITORY = Path(__file__).resolve().parents[2]
DEBUG_CONFIG = REPOSITORY / "configs" / "debug_cpu.yaml"
LEAN = ("logging.report=false", "logging.tensorboard=false", "evaluation.probe=false")
"""Overrides that leave the training itself."""


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Put back what the command sets for its whole process: threads, random state and logging."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        logging.captureWarnings(False)
        root.setLevel(level)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[Path], ModuleType]]:
    """Return a function that loads a script as a module. Its path guard acts on a copy of the path."""
    loaded: list[str] = []

    def load(path: Path) -> ModuleType:
        name = "script_" + "_".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its data classes look up their annotations
        loaded.append(name)
        before = sys.path
        sys.path = list(before)
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path = before
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def command() -> Callable[..., int]:
    """Run the training command with these arguments in this process; returns its exit code."""

    def run(*arguments: str) -> int:
        with _restored_process():
            return main(list(arguments))

    return run


@pytest.fixture(scope="session")
def debug_run(command: Callable[..., int]) -> Callable[..., int]:
    """Run `configs/debug_cpu.yaml` into a folder, with further arguments; returns the exit code."""

    def run(output_dir: Path, *arguments: str) -> int:
        return command("--config-file", str(DEBUG_CONFIG), "--output-dir", str(output_dir), *arguments)

    return run


@pytest.fixture(scope="session")
def lean_run(debug_run: Callable[..., int]) -> Callable[..., int]:
    """As `debug_run`, without report, probe and TensorBoard."""

    def run(output_dir: Path, *arguments: str) -> int:
        return debug_run(output_dir, *LEAN, *arguments)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, debug_run: Callable[..., int]) -> Path:
    """Return the folder of a complete run with everything on. For looking only: the tests share it."""
    folder = tmp_path_factory.mktemp("finished")
    assert debug_run(folder) == 0
    return folder


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Interrupt the next runs as Ctrl-C would, once `step` steps are done; None lets them pass again."""

    def arm(step: int | None) -> None:
        def interrupted_step(state: TrainState, *arguments: Any) -> dict[str, float]:
            if state.step == step:
                raise KeyboardInterrupt
            return train_step(state, *arguments)

        monkeypatch.setattr(guard, "train_step", interrupted_step)

    return arm


@pytest.fixture(scope="session")
def fingerprint() -> Callable[..., str]:
    """Return one hash over all tensors of the newest checkpoint of a run; `step` is what it must be of, where given.

    Weights of student, teacher and branch, centres, moments and step counters of the optimiser, random state.
    """

    def hash_of(output_dir: Path, step: int | None = None) -> str:
        store = CheckpointStore(output_dir / "checkpoints", read_only=True)
        assert step in (None, store.latest_step())
        checkpoint = store.load(step)
        assert set(checkpoint.tensors) == {"model", "optimizer", "rng"}
        tensors: dict[str, Tensor] = {}
        for file, values in checkpoint.tensors.items():
            assert values, file
            tensors |= {f"{file}/{name}": value for name, value in values.items()}
        return sha256_of_tensors(tensors)

    return hash_of


@pytest.fixture(scope="session")
def start_python() -> Callable[..., subprocess.Popen[str]]:
    """Start an interpreter with these arguments, as a user would in a clone that was not installed."""

    def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Put back the handlers that a command sets for its whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def run_on_ranks() -> Callable[[int, Callable[[], int]], list[int]]:
    """Return a function that calls another in forked processes, as a launcher starts them; it returns their results."""

    def run(world_size: int, command: Callable[[], int]) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                code = 99  # an exception; a test process must not go on here
                try:
                    code = command()
                finally:
                    os._exit(code)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return run


@pytest.fixture
def assert_refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that runs a script with wrong input and looks for one plain line with a message in it."""

    def run(script: ModuleType, words: Sequence[str], message: str) -> None:
        assert script.main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1

    return run


@pytest.fixture
def assert_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that trains a head twice, once with a stop, and compares what was measured."""

    def compare(script: ModuleType, model: type, words: Sequence[str], stop_at: int) -> None:
        whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
        assert script.main([*words, "--output", whole]) == 0
        losses = model.losses  # type: ignore[attr-defined]
        calls = 0

        def stopped(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return losses(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(model, "losses", stopped)
            assert script.main([*words, "--output", cut]) == 130
        assert script.main([*words, "--output", cut]) == 0
        found = [json.loads((Path(folder) / "results.json").read_text())["numbers"] for folder in (whole, cut)]
        assert found[0] == found[1]

    return compare
