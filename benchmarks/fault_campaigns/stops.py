"""Real training processes that are killed or signalled at random moments, and go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_campaigns.outcome import Outcome, fingerprint
from benchmarks.fault_campaigns.small_run import CONFIG, ROOT
from dinov2_equi.data.signals import STOP_SIGNALS
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.logging.metrics import METRICS_NAME, read_metrics
from dinov2_equi.run.command import EXIT_INTERRUPTED, EXIT_STOPPED

STEPS = 60
SETTINGS = (
    "optim.epochs=6",
    "logging.report=false",
    "logging.tensorboard=false",
    "evaluation.probe=false",
)
EVERY_STEP, SELDOM = 1, 25
"""Steps between two checkpoints: kills often come in the middle of a save; a signal has to save what is not saved."""

_LONGEST_PAUSE_SECONDS = 0.06  # about two steps
_TIMEOUT_SECONDS = 300.0
_MOST_TRIES = 4
_POLL_SECONDS = 0.002


def run_command(folder: Path, save_every: int) -> list[str]:
    """Return the training command that writes to a folder, as a user would type it."""
    script = str(ROOT / "dinov2_equi" / "run" / "train.py")
    return [
        sys.executable,
        script,
        "--config-file",
        str(CONFIG),
        "--output-dir",
        str(folder),
        *SETTINGS,
        f"train.checkpoint_every_steps={save_every}",
    ]


def start_run(folder: Path, save_every: int) -> subprocess.Popen[bytes]:
    """Start the training in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        run_command(folder, save_every), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish_run(folder: Path, save_every: int = SELDOM) -> str | None:
    """Train to the end; return None, or what went wrong."""
    with start_run(folder, save_every) as process:
        try:
            _, errors = process.communicate(timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"did not end within {_TIMEOUT_SECONDS:.0f} s"
    return None if process.returncode == 0 else f"exit code {process.returncode}: {errors.decode()[-300:].strip()}"


def final_hash(folder: Path) -> str:
    """Return the SHA-256 of model, optimiser and random state after the last step."""
    return fingerprint(CheckpointStore(folder / "checkpoints", read_only=True).load(STEPS).tensors)


def whole_run(folder: Path) -> str:
    """Train without any stop and return the final hash."""
    problem = finish_run(folder)
    if problem is not None:
        raise RuntimeError(f"the run without faults failed: {problem}")
    return final_hash(folder)


@dataclass(frozen=True)
class Stop:
    """How a process ended that was sent a signal; `was_late`: it had ended by itself before."""

    exit_code: int
    was_late: bool


def stop_at_random(folder: Path, number: int, rng: random.Random, *, first_line: int, save_every: int) -> Stop:
    """Start a run and send it a signal after a random number of log lines and a pause; return how it ended.

    Args:
        folder: of the run; its metrics get one line a step.
        number: of the signal.
        rng: draws the moment.
        first_line: least number of log lines; with 0 the moment may lie before the first step.
        save_every: steps between two checkpoints.
    """
    num_lines, pause = rng.randint(first_line, STEPS - 1), rng.uniform(0, _LONGEST_PAUSE_SECONDS)
    metrics = folder / METRICS_NAME
    began = folder / "logs"
    with start_run(folder, save_every) as process:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not began.exists() or (num_lines and _num_lines(metrics) < num_lines):
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        time.sleep(pause)
        was_late = process.poll() is not None
        process.send_signal(number)
        try:
            process.communicate(timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return Stop(process.returncode, was_late)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kills(count: int, folder: Path, reference: str, rng: random.Random) -> Outcome:
    """Kill `count` processes with SIGKILL and let each run go on to its end."""
    outcome = Outcome("after resume, final state bit for bit that of the run without a kill")
    outcome.details = {"in_the_middle_of_a_save": 0, "before_the_first_checkpoint": 0}
    for index in range(_MOST_TRIES * count):
        if outcome.cases == count:
            break
        run = folder / f"kill_{index}"
        stop = stop_at_random(run, signal.SIGKILL, rng, first_line=0, save_every=EVERY_STEP)
        if stop.was_late and stop.exit_code == 0:
            outcome.count("came_after_the_end_and_were_repeated")
            continue
        case = f"kill {index} after {_num_lines(run / METRICS_NAME)} lines"
        if stop.was_late:
            outcome.judge(case, f"the run had ended with exit code {stop.exit_code}")
            continue
        if any((run / "checkpoints").glob(".partial-*")):
            outcome.count("in_the_middle_of_a_save")
        if CheckpointStore(run / "checkpoints", read_only=True).latest_step() is None:
            outcome.count("before_the_first_checkpoint")
        outcome.judge(case, _compare(run, reference))
    _check_count(outcome, count)
    return outcome


def _check_count(outcome: Outcome, count: int) -> None:
    if outcome.cases < count:
        outcome.failures.append(f"{count - outcome.cases} of {count} came too late in all {_MOST_TRIES * count} tries")


def signals(count: int, folder: Path, reference: str, rng: random.Random) -> Outcome:
    """Send the four stop signals in turn to `count` processes and let each run go on to its end."""
    outcome = Outcome("last finished step saved, exit code 75 or 130, same final state after resume")
    for index in range(_MOST_TRIES * count):
        if outcome.cases == count:
            break
        number = STOP_SIGNALS[outcome.cases % len(STOP_SIGNALS)]
        run = folder / f"signal_{index}"
        stop = stop_at_random(run, number, rng, first_line=1, save_every=SELDOM)
        if CheckpointStore(run / "checkpoints", read_only=True).latest_step() == STEPS:
            outcome.count("came_after_the_last_step_and_were_repeated")  # nothing was left to stop
            continue
        outcome.count(number.name)
        case = f"{number.name} {index} after {_num_lines(run / METRICS_NAME)} lines"
        outcome.judge(case, _stop_problem(run, number, stop) or _compare(run, reference))
    _check_count(outcome, count)
    return outcome


def _stop_problem(run: Path, number: signal.Signals, stop: Stop) -> str | None:
    """Return how a stopped run differs from what was promised, or None."""
    expected = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED
    if stop.was_late or stop.exit_code != expected:
        return f"exit code {stop.exit_code} instead of {expected}"
    finished = int(read_metrics(run / METRICS_NAME)[-1]["iteration"]) + 1
    saved = CheckpointStore(run / "checkpoints", read_only=True).load().step
    return None if saved == finished else f"{finished} steps were finished, the checkpoint is of step {saved}"


def _compare(run: Path, reference: str) -> str | None:
    """Let a run go on and return how its end differs from that of the run without a stop, or None."""
    problem = finish_run(run)
    if problem is not None:
        return f"the resume failed: {problem}"
    return None if final_hash(run) == reference else "the final state differs"
