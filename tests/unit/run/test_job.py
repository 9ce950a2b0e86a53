"""A task of a SLURM job: it runs the command, and is queued again where a signal stopped it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov2_equi.data.signals import STOP_SIGNALS
from dinov2_equi.run import job as job_module
from dinov2_equi.run.job import CommandJob
from dinov2_equi.run.start_job import KEPT_WAITING


class FakeJob:
    """Stands in for what submitit says of a task: the first one of an array."""

    num_tasks, num_nodes, global_rank, local_rank, hostnames = 1, 1, 0, 0, ("localhost",)
    job_id, raw_job_id = "17_0", "17"
    state = "RUNNING"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Yield the commands that a job runs; it finds its script in `tmp_path` and no real SLURM."""
    found: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        if words[1] == "requeue":
            found.append(words)
        return SimpleNamespace(returncode=0, stdout=f"JobId=17 JobState={FakeJob.state} Requeue=1")

    monkeypatch.setattr(job_module, "ROOT", tmp_path)
    monkeypatch.setattr("submitit.JobEnvironment", FakeJob)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "before")  # put back after the test
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield found
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEPT_WAITING)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def job_of(folder: Path, body: str) -> CommandJob:
    (folder / "eval").mkdir()
    (folder / "eval" / "run.py").write_text(f"import os, signal\ndef main(argv):\n    {body}\n")
    return CommandJob(Path("eval/run.py"), [])


@pytest.mark.parametrize(("code", "is_queued"), [(0, False), (2, False), (75, True)])
def test_a_stopped_job_is_not_queued_again_or_the_whole_array_is(
    tmp_path: Path, calls: list[list[str]], code: int, is_queued: bool
) -> None:
    job = job_of(tmp_path, f"assert argv == ['--launcher', 'inline']; return {code}")
    if code:
        with pytest.raises(SystemExit) as stopped:
            job()
        assert stopped.value.code == code
    else:
        job()
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert calls == ([["scontrol", "requeue", "17_0"]] if is_queued else [])  # 17 is the array, not its first task


def test_a_relative_path_is_looked_for_in_the_copy_of_the_code(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, "open('here', 'w').close(); return 0")
    job.folder = tmp_path
    monkeypatch.chdir(tmp_path / "eval")
    job()
    assert (tmp_path / "here").is_file() and not calls
    assert CommandJob(Path("eval/run.py"), []).folder == tmp_path


def test_a_task_that_the_first_one_waits_for_does_not_queue_the_job_again(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task listens already, notes the signal, and waits in a collective for this one, which has stopped."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(FakeJob, "global_rank", 1)
    with pytest.raises(SystemExit):
        job_of(tmp_path, "os.kill(os.getpid(), signal.SIGUSR1); return 0")()
    assert calls == [["scontrol", "requeue", "17_0"]] and slept[0] >= 10


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_while_python_starts_ends_the_job_for_good(tmp_path: Path, calls: list[list[str]], name: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_WAITING)
    # To this thread: others, which a job does not have yet, do not keep it waiting.
    signal.raise_signal(signal.Signals[name])
    with pytest.raises(SystemExit):
        job_of(tmp_path, "return 0")()
    assert calls == [["scontrol", "requeue", "17_0"]]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_before_the_command_listens_ends_the_job_for_good(
    tmp_path: Path, calls: list[list[str]], name: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        job_of(tmp_path, f"os.kill(os.getpid(), signal.{name}); return 0")()
    assert stopped.value.code == 75
    assert calls == [["scontrol", "requeue", "17_0"]]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # or SLURM would wait before it kills the task
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_a_job_that_cannot_be_queued_again_holds_its_machines_or_looks_finished(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("subprocess.run", lambda words, **_: SimpleNamespace(returncode=1, stdout=""))
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(SystemExit) as stopped:
        job_of(tmp_path, "return 75")()
    assert stopped.value.code == 75 and not slept and not calls


@pytest.mark.parametrize("body", ["return 75", "os.kill(os.getpid(), signal.SIGTERM)"])
@pytest.mark.parametrize(
    ("state", "is_queued"),
    [("CANCELLED Reason=None", False), ("COMPLETING Reason=None", False), ("COMPLETING Reason=TimeLimit", True)],
)
def test_a_job_that_was_cancelled_comes_back_or_one_without_time_does_not(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, body: str, state: str, is_queued: bool
) -> None:
    monkeypatch.setattr(FakeJob, "state", state)
    with pytest.raises(SystemExit) as stopped:
        job_of(tmp_path, body)()
    assert stopped.value.code == 75 and len(calls) == int(is_queued)


# What SLURM 22.05 says of a pre-empted job that is still there.
IN_ITS_GRACE_TIME = "RUNNING Reason=None Restarts=0 EndTime=Unknown PreemptTime=2026-03-01T10:00:00"
CANCELLED_IN_ITS_GRACE_TIME = "COMPLETING Reason=None EndTime=2026-03-01T10:00:05 PreemptTime=2026-03-01T10:00:00"
ENDED = "COMPLETING Reason=None Restarts=0 EndTime=2026-03-01T10:00:00 PreemptTime=2026-03-01T10:00:00"
QUEUED_BY_SLURM = "COMPLETING Reason=None Restarts=1 EndTime=Unknown"


@pytest.mark.parametrize(
    ("state", "is_queued"),
    [(IN_ITS_GRACE_TIME, True), (CANCELLED_IN_ITS_GRACE_TIME, False), (ENDED, True), (QUEUED_BY_SLURM, False)],
)
def test_a_preempted_job_is_lost_or_queued_twice(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, state: str, is_queued: bool
) -> None:
    monkeypatch.setattr(FakeJob, "state", state)
    with pytest.raises(SystemExit) as stopped:
        job_of(tmp_path, "return 75")()
    assert stopped.value.code == 75 and len(calls) == int(is_queued)


def test_a_job_loads_torch_before_it_listens_to_signals() -> None:
    code = "import sys, dinov2_equi.run.job; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
