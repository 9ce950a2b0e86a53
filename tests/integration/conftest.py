"""Runs of the training command on `configs/debug_cpu.yaml`: inside this process where possible, since an interpreter
takes seconds to start and such a run takes one."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_equi.evaluation.summary import headline_numbers
from dinov2_equi.fsdp.checkpoint import CheckpointStore, sha256_of_tensors
from dinov2_equi.run.train import main
from dinov2_equi.train import guard
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import train_step
from tests.ranks import exit_codes, launch_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
DEBUG_CONFIG = REPOSITORY / "configs" / "debug_cpu.yaml"
InterruptedAt = Callable[[type, str, int], contextlib.AbstractContextManager[None]]
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


@pytest.fixture(scope="session")
def write_uneven_pairs() -> Callable[[Path, int], Path]:
    """Return a function that writes so many images [24, 32] with depth and two classes; the last fifth is measured.

    Ever more pixels are unknown, so that processes see different numbers of them.
    """

    def write(root: Path, count: int) -> Path:
        rng = np.random.default_rng(0)
        for name in ("images", "depth", "annotations"):
            (root / name).mkdir(parents=True)
        for number in range(count):
            far = rng.integers(0, 2, (3, 4)).repeat(8, axis=0).repeat(8, axis=1)  # [24, 32]
            unknown = rng.random(far.shape) < 0.04 * number
            pixels = np.stack([far * 200 + 20] * 3, axis=-1).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"images/{number}.png")
            depth = np.where(unknown, 0, far * 3000 + 1000).astype(np.uint16)
            Image.fromarray(depth).save(root / f"depth/{number}.png")
            labels = np.where(unknown, 255, far).astype(np.uint8)
            Image.fromarray(labels).save(root / f"annotations/{number}.png")
        (root / "classes.txt").write_text("near\nfar\n")
        return root

    return write


@pytest.fixture
def run_on_ranks() -> Callable[[int, Callable[[], int]], list[int]]:
    """Return a function that calls another in forked processes, as a launcher starts them; it returns their results."""
    return lambda world_size, command: exit_codes(launch_ranks(world_size, command))


@pytest.fixture
def assert_refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that runs a script with wrong input and looks for one plain line with a message in it."""

    def run(script: ModuleType, words: Sequence[str], message: str) -> None:
        assert script.main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1

    return run


@pytest.fixture
def assert_task_refused(
    script: ModuleType, folder: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> Callable[..., None]:
    """As `assert_refused`, of the module's own script on its own data, unless the words name others."""

    def run(words: Sequence[str], message: str) -> None:
        assert_refused(script, ["--data", str(folder), "--output", str(tmp_path / "out"), *words], message)

    return run


@pytest.fixture(scope="session")
def make_pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Any], Any]], Path]:
    """Return a function that writes ten images of bright and dark squares, and for each what another makes of them.

    Its arguments are a folder's name and a function from [24, 32], 1 where it is bright, to the pixels of a PNG there.
    """

    def make(name: str, target: Callable[[Any], Any]) -> Path:
        root = tmp_path_factory.mktemp(name)
        rng = np.random.default_rng(0)
        (root / "images").mkdir()
        (root / name).mkdir()
        for number in range(10):
            bright = rng.integers(0, 2, (3, 4)).repeat(8, axis=0).repeat(8, axis=1)
            pixels = np.stack([bright * 200 + 20] * 3, axis=-1).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            Image.fromarray(target(bright)).save(root / name / f"{number}.png")
        return root

    return make


@pytest.fixture(scope="session")
def labelled_pairs(make_pairs: Callable[[str, Callable[[Any], Any]], Path]) -> Path:
    """Return pairs for segmentation in which bright is one class and dark the other."""
    root = make_pairs("annotations", lambda bright: bright.astype(np.uint8))
    (root / "classes.txt").write_text("dark\nbright\n")
    return root


@pytest.fixture
def learn_segmentation(script: ModuleType, folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that trains a head on `labelled_pairs` with these words, and returns its results file.

    The head has to learn, and the same command not to train again.
    """

    def run(words: Sequence[str]) -> dict[str, Any]:
        given = [*words, "head=multiscale", "--data", str(folder), "--output", str(tmp_path)]
        assert script.main(given) == 0
        document: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
        (numbers,) = document["numbers"].values()
        assert document["task"] == "segmentation" and numbers["num_images"] == 2
        assert set(numbers["iou"]) == {"dark", "bright"}
        assert numbers["miou"] > 1.2 * numbers["majority_baseline"]["miou"]
        assert headline_numbers(document) == {"mIoU": numbers["miou"]}
        with Image.open(tmp_path / "predictions.png") as picture:
            assert picture.width > 400
        assert script.main(given) == 0  # from the last checkpoint
        assert json.loads((tmp_path / "results.json").read_text())["numbers"] == document["numbers"]
        return document

    return run


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> InterruptedAt:
    """Return a function from a class, a method of it and a number to a block in which that call is met by Ctrl-C."""

    @contextlib.contextmanager
    def block(owner: type, name: str, number: int) -> Iterator[None]:
        method = getattr(owner, name)
        calls = itertools.count(1)

        def stopped(*arguments: object) -> object:
            if next(calls) == number:
                raise KeyboardInterrupt
            return method(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopped)
            yield

    return block


@pytest.fixture
def assert_resumes(tmp_path: Path, interrupted_at: InterruptedAt) -> Callable[..., None]:
    """Return a function that trains a head twice, once with a stop, and compares what was measured."""

    def compare(script: ModuleType, model: type, words: Sequence[str], stop_at: int) -> None:
        whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
        assert script.main([*words, "--output", whole]) == 0
        with interrupted_at(model, "losses", stop_at):
            assert script.main([*words, "--output", cut]) == 130
        assert script.main([*words, "--output", cut]) == 0
        found = [json.loads((Path(folder) / "results.json").read_text())["numbers"] for folder in (whole, cut)]
        assert found[0] == found[1]

    return compare
