"""Commands as one of many processes, and as SLURM jobs: submit, and queue again where the time ended."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.distributed.env import get_world_size, is_main_process
from dinov2_equi.distributed.setup import Launch, process_group, read_launch
from dinov2_equi.logging.progress import TrainingProgress, training_progress
from dinov2_equi.run.command import EXIT_DONE, check_device, run_command
from dinov2_equi.run.job import ROOT, CommandJob

TRAIN_SCRIPT = Path("dinov2_equi/run/train.py")
FOLDER = "slurm"
"""In the run's folder: logs of its jobs, and for each submission the code that it runs and its configuration."""
CODE, CONFIG = "code", "config.yaml"
_SIZES = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "partition", "time", "signal_delay")
ARGUMENTS = ("launcher", *_SIZES, "slurm")
"""Names of what `add_arguments` adds: how a command is started, and nothing of what it finds."""
_NOT_DESCRIBED = ("output", "set", "config", *ARGUMENTS)


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
        signal_delay_s: how long before the end of its time a job is told, in seconds (SLURM may tell it a minute
            earlier): long enough for a step and a checkpoint.
        further: other options of sbatch by their long names, for instance `{"account": "vision"}`.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    signal_delay_s: int = 120
    further: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a SLURM job to a command."""
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
    delay = f"how long before the end of its time a job saves (default: {Allocation.signal_delay_s})"
    add("--signal-delay", type=int, metavar="SECONDS", help=delay)
    add("--slurm", nargs="+", default=[], metavar="option=value", help="other options of sbatch, e.g. account=vision")


def is_for_slurm(args: argparse.Namespace) -> bool:
    """Return whether the command asks for a SLURM job, or for an array of them where it knows `sweep`.

    Raises:
        ValueError: if it is to run here and has options of a job.
    """
    sweep = getattr(args, "sweep", None)
    if args.launcher == "inline" and sweep:
        raise ValueError(
            "--sweep submits an array of SLURM jobs; to train here, call the command once for each configuration, with "
            "an --output-dir of its own"
        )
    asked = bool(args.slurm or sweep) or any(getattr(args, name) is not None for name in _SIZES)
    if args.launcher == "inline" and asked:
        raise ValueError("--launcher inline runs here and takes no options of SLURM")
    return args.launcher == "slurm" or (args.launcher == "auto" and asked)


def allocation_of(args: argparse.Namespace) -> Allocation:
    """Return what the command asks for.

    Raises:
        ValueError: if a number is below 1 or an option has no value.
    """
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "signal_delay"):
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
        signal_delay_s=args.signal_delay or Allocation.signal_delay_s,
        further=further,
    )


def num_processes(args: argparse.Namespace) -> int:
    """Return how many processes run a command: those of the job that it asks for, else those that there are."""
    if is_for_slurm(args):
        allocation = allocation_of(args)
        return allocation.nodes * allocation.tasks_per_node
    return get_world_size()


def run_launched(
    command: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    script: Path,
    check: Callable[[argparse.Namespace], object],
    interrupted: str = "interrupted",
) -> int:
    """Run a command here, as one of the processes that a launcher started, or submit it; return its exit code.

    Args:
        command: called in every process, with its own device in `args.device`; see `run_command`.
        parser: has `add_arguments`, `--output` and `--device`, and maybe `--config`.
        argv: the words of the command; None: those of this process.
        script: file whose `main(words)` is the command.
        check: raises where something is wrong that need not wait for the queue.
        interrupted: what is said after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def launched(_: argparse.Namespace) -> int:
        if is_for_slurm(args):
            check(args)
            print(_submit_command(args, words, script))
            return EXIT_DONE
        check_device(args.device)  # of this machine; those of a job's machines may differ
        process = read_launch()
        args.device = device_of(args.device, process)
        with process_group(process, torch.device(args.device).type):
            return command(args)

    return run_command(launched, argparse.Namespace(), interrupted=interrupted)


@contextlib.contextmanager
def shown_progress(total_steps: int, *, images_per_step: int = 0) -> Iterator[TrainingProgress]:
    """Show progress as `training_progress` does; of several processes only the first one shows it."""
    hidden = None if is_main_process() else Console(quiet=True)
    with training_progress(total_steps, images_per_step=images_per_step, console=hidden) as progress:
        yield progress


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return the command line as it is written to the results, and the number of processes."""
    kept = {name: value for name, value in vars(args).items() if name not in _NOT_DESCRIBED}
    return kept | {"num_processes": get_world_size()}


def device_of(name: str, process: Launch) -> str:
    """Return the device of one process: with `cuda` each process of a machine has its own.

    Raises:
        ValueError: fewer devices than processes, or several processes on one.
    """
    kind, _, index = name.partition(":")
    if kind != "cuda" or process.world_size == 1:
        return name
    if index:
        raise ValueError(f"--device {name} is one device for {process.world_size} processes: give --device cuda")
    count = torch.cuda.device_count()
    if process.local_rank >= count:
        raise ValueError(
            f"process {process.local_rank} of this machine has no CUDA device of its own, there are {count}: start as "
            f"many processes, torchrun --nproc-per-node {count}"
        )
    return f"cuda:{process.local_rank}"


def _submit_command(args: argparse.Namespace, words: Sequence[str], script: Path) -> str:
    """Submit a command and return what is said about it."""
    own = argparse.ArgumentParser(add_help=False)
    add_arguments(own)
    _, kept = own.parse_known_args(words)
    output = args.output.expanduser().resolve()
    kept += ["--output", str(output)]
    script = script.resolve().relative_to(ROOT)
    folder = _new_folder(output)
    executor = _executor(output, folder, allocation_of(args), script)
    config: Path | None = getattr(args, "config", None)
    if config is not None:
        kept += ["--config", str(_write_config(folder, config.read_text(encoding="utf-8")))]
    with _refusals_explained():
        job = str(executor.submit(CommandJob(script, kept)).job_id)
    return f"job {job} was submitted; its log: {log_of(output, job)}"


def log_of(output_dir: Path, job: str) -> Path:
    """Return the log of a job's first task."""
    return output_dir / FOLDER / f"{job}_0_log.out"


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
        ValueError: if this machine has no SLURM, or SLURM does not accept the job.
    """
    folder = _new_folder(output_dir)
    executor = _executor(output_dir, folder, allocation, TRAIN_SCRIPT)
    with _refusals_explained():
        return str(executor.submit(_training_job(cfg, output_dir, folder, flags)).job_id)


def submit_sweep(
    runs: Mapping[Path, Config], sweep_dir: Path, allocation: Allocation, *, flags: Sequence[str] = ()
) -> list[str]:
    """Submit trainings as one array of jobs and return their numbers, `ARRAY_TASK`, in the order of `runs`.

    One copy of the code serves all; it and the logs lie in the folder of the sweep.

    Args:
        runs: validated configuration by run folder.
        sweep_dir: folder of the sweep.
        allocation: what each job gets.
        flags: further flags of the training command.

    Raises:
        ValueError: if this machine has no SLURM, or SLURM does not accept the jobs.
    """
    executor = _executor(sweep_dir, _new_folder(sweep_dir), allocation, TRAIN_SCRIPT)
    with _refusals_explained(), executor.batch():
        jobs = [
            executor.submit(_training_job(cfg, output_dir, _new_folder(output_dir), flags))
            for output_dir, cfg in runs.items()
        ]
    return [str(job.job_id) for job in jobs]


def check_slurm() -> None:
    """Refuse to submit from a machine that belongs to no cluster.

    Raises:
        ValueError: sbatch is not there.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch was not found: --launcher slurm works on a machine of a SLURM cluster")


@contextlib.contextmanager
def _refusals_explained() -> Iterator[None]:
    """Submit in this block: what SLURM does not accept, such as a partition it does not know, is the user's to change.

    Raises:
        ValueError: with the words of sbatch.
    """
    import submitit

    try:
        yield
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"SLURM does not accept the job: {'; '.join(str(error).splitlines())}") from error


def _new_folder(output_dir: Path) -> Path:
    """Return a new folder for what one submission copies: jobs submitted earlier still use theirs."""
    check_slurm()
    parent = output_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("submitted_%Y%m%d-%H%M%S_"), dir=parent))


def _training_job(cfg: Config, output_dir: Path, folder: Path, flags: Sequence[str]) -> CommandJob:
    config = _write_config(folder, to_yaml(cfg))
    return CommandJob(TRAIN_SCRIPT, ["--config-file", str(config), "--output-dir", str(output_dir), *flags])


def _write_config(folder: Path, text: str) -> Path:
    path = folder / CONFIG
    path.write_text(text, encoding="utf-8")
    return path


def _executor(output_dir: Path, folder: Path, allocation: Allocation, script: Path) -> Any:
    """Return what submits jobs that log into `output_dir` and run a copy of the code made now in `folder`."""
    import submitit

    _copy_code(folder / CODE, script)
    start = folder / CODE / "dinov2_equi" / "run" / "start_job.py"
    executor = submitit.SlurmExecutor(
        folder=output_dir / FOLDER, python=f"{shlex.quote(sys.executable)} -u {shlex.quote(str(start))}"
    )
    executor.update_parameters(**_parameters(allocation, name=output_dir.name, code=folder / CODE))
    return executor


def _copy_code(target: Path, script: Path) -> None:
    for name in {"dinov2_equi", script.parts[0]}:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def _parameters(allocation: Allocation, *, name: str, code: Path) -> dict[str, object]:
    """Return the parameters of submitit; what was not asked for is left to the cluster."""
    quoted = shlex.quote(str(code))
    asked = {
        "nodes": allocation.nodes,
        "ntasks_per_node": allocation.tasks_per_node,
        "gpus_per_node": allocation.gpus_per_node or None,
        "cpus_per_task": allocation.cpus_per_task,
        "time": allocation.time,
        "partition": allocation.partition,
        "additional_parameters": {**allocation.further, "requeue": True},
        "job_name": name,
        "signal_delay_s": allocation.signal_delay_s,
        "stderr_to_stdout": True,
        "setup": [f"cd {quoted}", f"export PYTHONPATH={quoted}${{PYTHONPATH:+:$PYTHONPATH}}"],
    }
    return {key: value for key, value in asked.items() if value is not None}
