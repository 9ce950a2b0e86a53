"""A training and a harness as jobs of a real SLURM: stopped by a signal and by the time limit, queued again, finished.

`scripts/slurm_dev_cluster.sh start` gives one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.fsdp.checkpoint import CheckpointStore

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "dinov2_equi" / "run" / "train.py"
DEBUG = ("--config-file", str(REPOSITORY / "configs" / "debug_cpu.yaml"))
LEAN = ("logging.report=false", "logging.tensorboard=false", "evaluation.probe=false")
STEPS = 600
LONG = (f"optim.epochs={STEPS // 10}", "train.batch_size_per_gpu=2", "train.checkpoint_every_steps=100000", *LEAN)
"""Longer than SLURM takes to look at time limits, which it does every 30 seconds; saved only when it is stopped."""
PATIENCE_S = 420  # with SLURM's own settings two minutes go by before a job starts again

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(PATIENCE_S + 120)]


def is_answering() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["timeout", "20", "sinfo"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    """Skip where no SLURM answers, unless REQUIRE_SLURM is set: what should run must not be skipped unseen."""
    if not is_answering():
        assert not os.environ.get("REQUIRE_SLURM"), "REQUIRE_SLURM is set, but sinfo gets no answer"
        pytest.skip("no SLURM answers; `scripts/slurm_dev_cluster.sh start` starts one")


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.2)


def num_steps(folder: Path) -> int:
    log = folder / "training_metrics.json"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def submit(script: Path, *words: str) -> list[str]:
    """Submit a command and return the numbers of its jobs."""
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall(r"job ([\d_]+) was submitted", done.stdout)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, fingerprint: Callable[..., str]) -> str:
    """Return the hash of the final state of the run on two processes of this machine, in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(TRAIN), *DEBUG, "--output-dir", str(folder), *LONG], check=True)
    assert "resumed" not in (folder / "logs" / "log.txt").read_text()
    return fingerprint(folder, STEPS)


def assert_goes_on_to_the_end(run: Path, job: str, expected: str, fingerprint: Callable[..., str]) -> None:
    """Wait for the end of a run that was stopped on its way and compare the state it ends with."""
    wait_until((run / "results.json").is_file, "the end of the run")
    log = (run / "slurm" / f"{job}_0_log.out").read_text()
    assert f"queueing job {job} again" in log and "2 processes" in log
    assert "resumed after step" in (run / "logs" / "log.txt").read_text()
    assert fingerprint(run, STEPS) == expected


def test_a_job_that_is_told_to_end_loses_steps_or_goes_on_with_other_code(
    tmp_path: Path, uninterrupted: str, fingerprint: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    (job,) = submit(TRAIN, *DEBUG, "--output-dir", str(run), "--nodes", "2", "--time", "30", *LONG)
    wait_until(lambda: num_steps(run) > 20, "twenty steps")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    store = CheckpointStore(run / "checkpoints", read_only=True)
    wait_until(lambda: store.latest_step() is not None, "the checkpoint of the stop")
    stopped_after = store.latest_step()
    assert stopped_after is not None and 20 < stopped_after < STEPS
    # Only the copy says so, and only from here on: it is what runs, and it is not made again.
    (copy,) = run.glob("slurm/submitted_*/code/dinov2_equi/run/train.py")
    with copy.open("a") as script:
        script.write("\nsys.stdout.write('the copy of the code runs\\n')\n")
    assert_goes_on_to_the_end(run, job, uninterrupted, fingerprint)
    assert f"resumed after step {stopped_after}" in (run / "logs" / "log.txt").read_text()
    log = (run / "slurm" / f"{job}_0_log.out").read_text()
    assert log.index("the copy of the code runs") > log.index(f"queueing job {job} again")


def test_a_job_whose_time_ends_loses_steps_or_is_not_started_again(
    tmp_path: Path, uninterrupted: str, fingerprint: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    limits = ("--tasks-per-node", "2", "--time", "30", "--signal-delay", "95")
    begin = time.monotonic()
    (job,) = submit(TRAIN, *DEBUG, "--output-dir", str(run), *limits, *LONG)
    wait_until(lambda: num_steps(run) > 20, "twenty steps")
    # SLURM knows whole minutes and looks twice in one: an end within two is told when it looks, half a minute at most.
    soon = int(time.monotonic() - begin) // 60 + 2
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={soon}"], check=True)
    store = CheckpointStore(run / "checkpoints", read_only=True)
    wait_until(lambda: store.latest_step() is not None, "the checkpoint of the stop")
    assert store.latest_step() != STEPS, "the run was over before SLURM looked at its time: raise STEPS"
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)  # one stop is enough
    assert_goes_on_to_the_end(run, job, uninterrupted, fingerprint)
    assert "SIGUSR2: finishing this step" in (run / "slurm" / f"{job}_0_log.out").read_text()


def test_a_job_that_was_cancelled_comes_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (job,) = submit(TRAIN, *DEBUG, "--output-dir", str(run), "--time", "10", *LONG)
    wait_until(lambda: num_steps(run) > 3, "three steps")
    subprocess.run(["scancel", job], check=True)
    shown = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    wait_until(lambda: "COMPLETING" not in subprocess.check_output(shown, text=True), "the end of the job")
    assert subprocess.check_output(shown, text=True).split() == ["CANCELLED"]
    # A loaded machine may need longer for its step than SLURM waits before it kills; then there is nothing to say.
    log = (run / "slurm" / f"{job}_0_log.out").read_text()
    assert "queueing" not in log and ("which is not queued again from here" in log or "Killed" in log)


def test_a_preempted_job_is_lost_or_loses_steps(
    tmp_path: Path, debug_run: Callable[..., int], fingerprint: Callable[..., str]
) -> None:
    """Both at once: a partition that lets its jobs save and then cancels them, and one that queues them again at once.

    The one kills jobs that do not queue themselves again within a minute; the other sends SIGTERM twice in a row.
    """
    shown = subprocess.check_output(["sinfo", "--noheader", "--format=%R"], text=True).split()
    if not {"dev_low", "dev_low_now", "dev_high"} <= set(shown):  # on another cluster it would end jobs of others
        pytest.skip("only on the cluster of scripts/slurm_dev_cluster.sh")
    runs = {name: tmp_path / name for name in ("dev_low", "dev_low_now")}
    words = (TRAIN, *DEBUG, *LONG)
    with ThreadPoolExecutor() as threads:  # together: neither is over when the other one starts
        asked = [
            threads.submit(submit, *words, "--output-dir", str(run), "--partition", name) for name, run in runs.items()
        ]
    jobs = {name: numbers.result()[0] for name, numbers in zip(runs, asked, strict=True)}
    wait_until(lambda: all(num_steps(run) > 10 for run in runs.values()), "ten steps")
    where = subprocess.check_output(["squeue", "--noheader", f"--jobs={','.join(jobs.values())}", "--format=%N"])
    nodes = ",".join(sorted(set(where.decode().split())))
    urgent = ["sbatch", "--partition=dev_high", "--exclusive", f"--nodelist={nodes}", "--output=/dev/null", "--wrap=:"]
    subprocess.run(urgent, check=True)
    assert debug_run(tmp_path / "uninterrupted", *LONG) == 0  # while they wait for their next start
    for name, run in runs.items():
        wait_until((run / "results.json").is_file, f"the end of the run in {name}")
        log = (run / "slurm" / f"{jobs[name]}_0_log.out").read_text()
        (saved,) = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", log)
        assert f"resumed after step {saved}" in (run / "logs" / "log.txt").read_text()
        assert fingerprint(run, STEPS) == fingerprint(tmp_path / "uninterrupted", STEPS)
        state = subprocess.check_output(["scontrol", "show", "job", jobs[name]], text=True)
        assert "Restarts=1 " in state  # neither forgotten nor queued twice


def test_an_array_mixes_up_its_runs_or_is_queued_again_as_a_whole(tmp_path: Path) -> None:
    files = {seed: tmp_path / f"seed_{seed}.yaml" for seed in (1, 2)}
    for seed, file in files.items():
        file.write_text(f"train:\n  seed: {seed}\n")
    sweep = ("--sweep", *map(str, files.values()), "optim.epochs=10", *LEAN)
    jobs = submit(TRAIN, *DEBUG, "--output-dir", str(tmp_path / "out"), "--time", "10", *sweep)
    assert [job.partition("_")[2] for job in jobs] == ["0", "1"]
    runs = [tmp_path / "out" / file.stem for file in files.values()]
    wait_until(lambda: num_steps(runs[0]) > 10, "ten steps")
    subprocess.run(["scancel", "--signal=USR1", jobs[0]], check=True)
    for seed, run in zip(files, runs, strict=True):
        wait_until((run / "results.json").is_file, f"the end of {run.name}")
        assert f"seed: {seed}\n" in (run / "config.yaml").read_text()
    logs = [(run / "logs" / "log.txt").read_text() for run in runs]
    assert ["resumed after step" in log for log in logs] == [True, False]


def test_a_harness_that_is_told_to_end_loses_steps_or_is_not_started_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(rng.integers(1000, 4000, (24, 32), dtype=np.uint16)).save(tmp_path / f"depth/{number}.png")
    run, steps = tmp_path / "run", 1500
    sizes = [f"steps={steps}", "warmup_steps=1", "batch_size=4", "height=24", "width=32", "save_every=5000"]
    words = ["--weights", "random:vit_test_tiny/8", "--device", "cpu", "--data", str(tmp_path), "--output", str(run)]
    script = REPOSITORY / "eval" / "depth" / "run.py"
    (job,) = submit(script, *words, "--tasks-per-node", "2", "--time", "10", "--set", *sizes)
    log = run / "logs" / "log.txt"
    wait_until(lambda: log.is_file() and f"/{steps}" in log.read_text(), "some steps")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    store = CheckpointStore(run / "checkpoints", read_only=True)
    wait_until(lambda: store.latest_step() not in (None, steps), "a checkpoint on the way")
    wait_until(lambda: (run / "results.json").is_file(), "the end of the run")
    assert store.steps()[-1] == steps
    assert '"num_processes": 2' in (run / "results.json").read_text()
