"""A command as one task of a SLURM job.

Imports next to nothing: a signal that comes before the job listens ends it for good.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dinov2_equi.data.signals import STOP_SIGNALS
from dinov2_equi.run.start_job import KEPT_WAITING

ROOT = Path(__file__).resolve().parents[2]
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: a signal stopped the command, which is to be tried again. For SLURM's RequeueExit."""
_FIRST_PORT, _NUM_PORTS = 20000, 20000
_KILLED_WITHIN_S = 300
_FIRST_TASK_WITHIN_S = 20


class CommandJob:
    """A command as one task of a SLURM job.

    Attributes:
        script: its file, below the root of the code.
        arguments: its words.
        folder: the working directory of the command; the job itself starts in the copy of the code, because Python
            looks for modules in the working directory first.
    """

    def __init__(self, script: Path, arguments: Sequence[str]) -> None:
        self.script = script
        self.arguments = [*arguments, "--launcher", "inline"]
        self.folder = Path.cwd()

    def __call__(self) -> None:
        """Run the command; where a signal stopped it, queue the job again, unless somebody cancelled it.

        Raises:
            SystemExit: with the exit code of the command where that is not 0.
        """
        import submitit

        job = submitit.JobEnvironment()

        def queue_again(number: int, _: FrameType | None) -> None:
            # The command does not listen yet, or no more: it has nothing to save.
            os.write(1, f"{signal.Signals(number).name} came between the steps\n".encode())
            _queue_again(job)
            raise SystemExit(EXIT_STOPPED)

        for number in STOP_SIGNALS:
            signal.signal(number, queue_again)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, KEPT_WAITING)
        os.environ |= {
            "WORLD_SIZE": str(job.num_tasks),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
            "MASTER_ADDR": job.hostnames[0],
            "MASTER_PORT": str(_FIRST_PORT + int(job.raw_job_id) % _NUM_PORTS),
        }
        os.chdir(self.folder)
        code = _main_of(ROOT / self.script)(self.arguments)
        if code == EXIT_STOPPED:
            _queue_again(job)
        if code:
            raise SystemExit(code)


def _queue_again(job: Any) -> None:
    """Queue a job again and wait for SLURM to end this task; return where it was cancelled or SLURM refused.

    The first task does it. Where it has not, because it waits for this one in the middle of a start, another one does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which SLURM ends the tasks, or kills them much later
    if job.global_rank:
        time.sleep(_FIRST_TASK_WITHIN_S)
    if _is_left_to_slurm(job.job_id):
        os.write(1, f"SLURM is ending job {job.job_id}, which is not queued again from here\n".encode())
        return
    os.write(1, f"queueing job {job.job_id} again\n".encode())  # also in the middle of a log line
    if subprocess.run(["scontrol", "requeue", job.job_id], check=False).returncode:
        return
    time.sleep(_KILLED_WITHIN_S)  # a task that ended would be taken for the end of the job


def _is_left_to_slurm(job_id: str) -> bool:
    """Return whether SLURM ends a job that is not to be queued again from here, or queues it again itself.

    A job that is told to end still runs. One that SLURM ends is completing, for want of time, because of `scancel`
    (queued again all the same if asked to), or pre-empted. Where the partition has `PreemptMode=REQUEUE`, SLURM has
    queued it again itself and forgotten when it was pre-empted; with `CANCEL` that is the moment in which it ended.
    """
    shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False).stdout
    fields = dict(word.partition("=")[::2] for word in shown.split())
    if fields.get("JobState") not in ("CANCELLED", "COMPLETING", "PREEMPTED"):
        return False
    is_preempted = "PreemptTime" in fields and fields["PreemptTime"] == fields.get("EndTime")
    return fields.get("Reason") != "TimeLimit" and not is_preempted


def _main_of(script: Path) -> Callable[[Sequence[str]], int]:
    """Return the function `main` of a script; scripts of `eval/` are files and no modules."""
    name = "command_" + "_".join(script.with_suffix("").parts[-3:])
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes look their module up
    spec.loader.exec_module(module)
    main: Callable[[Sequence[str]], int] = module.main
    return main
