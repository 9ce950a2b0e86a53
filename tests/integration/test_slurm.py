"""A training and a harness as jobs of a real SLURM: two tasks, stopped by a signal, queued again, finished."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.fsdp.checkpoint import CheckpointStore

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "dinov2_equi" / "run" / "train.py"
LEAN = ("logging.report=false", "logging.tensorboard=false", "evaluation.probe=false")
PATIENCE_S = 420  # SLURM waits two minutes before it starts a job again

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(PATIENCE_S + 120)]


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(1)


def num_steps(folder: Path) -> int:
    log = folder / "training_metrics.json"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def test_a_job_that_is_told_to_end_loses_steps_or_is_not_started_again(tmp_path: Path) -> None:
    words = ["optim.epochs=40", "train.batch_size_per_gpu=2", "logging.metrics_every_steps=1", *LEAN]
    command = [sys.executable, str(TRAIN), "--config-file", str(REPOSITORY / "configs" / "debug_cpu.yaml")]
    command += ["--output-dir", str(tmp_path / "run"), "--tasks-per-node", "2", "--time", "10", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"job (\d+) was submitted", done.stdout)
    assert found is not None, done.stdout
    job, run = found[1], tmp_path / "run"
    wait_until(lambda: num_steps(run) > 20, "twenty steps")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    store = CheckpointStore(run / "checkpoints", read_only=True)
    wait_until(lambda: store.latest_step() not in (None, *range(0, 401, 30)), "a checkpoint between two periods")
    stopped_after = store.latest_step()
    wait_until(lambda: (run / "results.json").is_file(), "the end of the run")
    log = (run / "slurm" / f"{job}_0_log.out").read_text()
    assert f"resumed after step {stopped_after}" in (run / "logs" / "log.txt").read_text()
    assert "2 processes" in log


def test_a_harness_that_is_told_to_end_loses_steps_or_is_not_started_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(rng.integers(1000, 4000, (24, 32), dtype=np.uint16)).save(tmp_path / f"depth/{number}.png")
    run, steps = tmp_path / "run", 1500
    command = [sys.executable, str(REPOSITORY / "eval" / "depth" / "run.py"), "--weights", "random:vit_test_tiny/8"]
    command += [
        "--device",
        "cpu",
        "--data",
        str(tmp_path),
        "--output",
        str(run),
        "--tasks-per-node",
        "2",
        "--time",
        "10",
    ]
    command += ["--set", f"steps={steps}", "warmup_steps=1", "batch_size=4", "height=24", "width=32", "save_every=5000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"job (\d+) was submitted", done.stdout)
    assert found is not None, done.stdout
    log = run / "logs" / "log.txt"
    wait_until(lambda: log.is_file() and f"/{steps}" in log.read_text(), "some steps")
    subprocess.run(["scancel", "--signal=USR2", found[1]], check=True)
    store = CheckpointStore(run / "checkpoints", read_only=True)
    wait_until(lambda: store.latest_step() not in (None, steps), "a checkpoint on the way")
    wait_until(lambda: (run / "results.json").is_file(), "the end of the run")
    assert store.steps()[-1] == steps
    assert '"num_processes": 2' in (run / "results.json").read_text()
