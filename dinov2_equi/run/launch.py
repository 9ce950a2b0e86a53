"""Trainings as SLURM jobs: submit, run as one of many tasks, and queue again where the time ended."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "slurm"
"""In the run's folder: logs of the job, the code that it runs, and its configuration."""
CODE = "code"
SIGNAL_DELAY_S = 120
"""How long before the end of its time a job is told: long enough for a step and a checkpoint."""
_FIRST_PORT, _NUM_PORTS = 20000, 20000
_KILLED_WITHIN_S = 300


@dataclass(frozen=True)
class Allocation:
    """What a job asks for.

    Attributes:
        nodes: machines.
        tasks_per_node: processes on each, one a GPU.
        gpus_per_node: GPUs of each; 0 asks for none.
        cpus_per_task: cores of each process, for its loaders; None leaves it to the cluster.
        time: as sbatch takes it, for instance `3-00:00:00`; None leaves it to the cluster.
        partition: where; None leaves it to the cluster.
        further: other options of sbatch by their long names, for instance `{"account": "vision"}`.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    further: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a SLURM job to the training command."""
    group = parser.add_argument_group("on a SLURM cluster (nothing about it is guessed)")
    add = group.add_argument
    launcher = "inline: here, also under torchrun; slurm: submit a job; auto (default): slurm if one of these is given"
    add("--launcher", choices=("auto", "inline", "slurm"), default="auto", help=launcher)
    add("--nodes", type=int, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of each, and as many processes (default: none)")
    add("--tasks-per-node", type=int, metavar="N", help="processes on each (default: one a GPU)")
    add("--cpus-per-task", type=int, metavar="N", help="cores of each process")
    add("--partition", metavar="NAME")
    add("--time", metavar="TIME", help="for instance 3-00:00:00; a run that needs more is queued again and goes on")
    add("--slurm", nargs="+", default=[], metavar="option=value", help="other options of sbatch, e.g. account=vision")


def is_for_slurm(args: argparse.Namespace) -> bool:
    """Return whether the command asks for a SLURM job."""
    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "partition", "time")
    asked = bool(args.slurm) or any(getattr(args, name) is not None for name in names)
    if args.launcher == "inline" and asked:
        raise ValueError("--launcher inline trains here and takes no options of SLURM")
    return args.launcher == "slurm" or (args.launcher == "auto" and asked)


def allocation_of(args: argparse.Namespace) -> Allocation:
    """Return what the command asks for.

    Raises:
        ValueError: if a number is below 1 or an option has no value.
    """
    for name in ("nodes", "tasks_per_node", "cpus_per_task"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    further = dict(word.partition("=")[::2] for word in args.slurm)
    if not all(further.values()):
        raise ValueError(f"--slurm takes option=value, got {' '.join(args.slurm)}")
    gpus = args.gpus_per_node or 0
    return Allocation(
        nodes=args.nodes or 1,
        tasks_per_node=args.tasks_per_node or max(gpus, 1),
        gpus_per_node=gpus,
        cpus_per_task=args.cpus_per_task,
        time=args.time,
        partition=args.partition,
        further=further,
    )


def submit(cfg: Config, output_dir: Path, allocation: Allocation, *, flags: Sequence[str] = ()) -> str:
    """Submit a training and return the number of its job.

    The code and the resolved configuration are copied into the run's folder and the job uses these copies, also when it
    is queued again: what is edited meanwhile does not reach it.

    Args:
        cfg: validated configuration.
        output_dir: the run's folder.
        allocation: what the job gets.
        flags: further flags of the training command.

    Raises:
        ValueError: if this machine has no SLURM.
    """
    import submitit

    if shutil.which("sbatch") is None:
        raise ValueError("sbatch was not found: --launcher slurm works on a machine of a SLURM cluster")
    folder = output_dir / FOLDER
    _copy_code(folder / CODE)
    config = folder / "config.yaml"
    config.write_text(to_yaml(cfg), encoding="utf-8")
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(**_parameters(allocation, name=output_dir.name, code=folder / CODE))
    arguments = ["--launcher", "inline", "--config-file", str(config), "--output-dir", str(output_dir), *flags]
    return str(executor.submit(TrainJob(arguments)).job_id)


def _copy_code(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "dinov2_equi", target / "dinov2_equi", ignore=shutil.ignore_patterns("__pycache__"))


def _parameters(allocation: Allocation, *, name: str, code: Path) -> dict[str, object]:
    """Return the parameters of submitit; what was not asked for is left to the cluster."""
    asked = {
        "nodes": allocation.nodes,
        "ntasks_per_node": allocation.tasks_per_node,
        "gpus_per_node": allocation.gpus_per_node or None,
        "cpus_per_task": allocation.cpus_per_task,
        "time": allocation.time,
        "partition": allocation.partition,
        "additional_parameters": {**allocation.further, "requeue": True},
        "job_name": name,
        "signal_delay_s": SIGNAL_DELAY_S,
        "stderr_to_stdout": True,
        "setup": [f'export PYTHONPATH="{code}"${{PYTHONPATH:+:$PYTHONPATH}}'],
    }
    return {key: value for key, value in asked.items() if value is not None}


class TrainJob:
    """The training command as one task of a SLURM job."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Keep the arguments of the command."""
        self.arguments = list(arguments)

    def __call__(self) -> None:
        """Run the command; where a signal stopped it, queue the job again.

        Raises:
            SystemExit: with the exit code of the command where that is not 0.
        """
        import submitit

        from dinov2_equi.run.exit_codes import EXIT_STOPPED
        from dinov2_equi.run.train import main

        job = submitit.JobEnvironment()
        os.environ |= {
            "WORLD_SIZE": str(job.num_tasks),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "MASTER_ADDR": job.hostnames[0],
            "MASTER_PORT": str(_FIRST_PORT + int(job.raw_job_id) % _NUM_PORTS),
        }
        code = main(self.arguments)
        if code == EXIT_STOPPED:
            if job.global_rank == 0:
                sys.stdout.write(f"queueing job {job.raw_job_id} again\n")
                subprocess.run(["scontrol", "requeue", job.raw_job_id], check=True)
            time.sleep(_KILLED_WITHIN_S)  # a task that ended would be taken for the end of the job
        if code:
            raise SystemExit(code)
