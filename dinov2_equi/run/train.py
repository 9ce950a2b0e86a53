"""Train DINOv2 with the equivariance branch.

    python dinov2_equi/run/train.py --config-file configs/quickstart.yaml --output-dir runs/quickstart [key=value ...]

On several GPUs of a machine, or several processes of a CPU:

    torchrun --nproc-per-node 8 dinov2_equi/run/train.py --config-file ... --output-dir ...

As a SLURM job, which is queued again when its time ends and goes on:

    python dinov2_equi/run/train.py --launcher slurm --nodes 4 --gpus-per-node 8 --partition P --time 3-00:00:00 ...

Several runs as one array of jobs, each in a folder below --output-dir: `--sweep A.yaml B.yaml`.

Several configuration files, `--config-file A.yaml B.yaml`, are read in this order; the last to name a key decides.
Running the same command again goes on where the last run stopped. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C let it finish
its step and save; a second one ends it at once. The exit codes are in `--help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: Python put this folder on the path, not the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import logging
import signal
from collections.abc import Mapping, Sequence

import torch

from dinov2_equi.config.derive import Derived, derive
from dinov2_equi.config.schema import Config
from dinov2_equi.distributed.collectives import wait_for_all_ranks
from dinov2_equi.distributed.env import get_rank, get_world_size, is_main_process
from dinov2_equi.distributed.setup import process_group, read_launch
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.layers.backend import describe_backend
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run import launch
from dinov2_equi.run.allocator import keep_freed_memory
from dinov2_equi.run.command import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from dinov2_equi.run.evaluation_hook import evaluation_hook
from dinov2_equi.run.exit_codes import EXIT_NON_FINITE, describe_exit_codes
from dinov2_equi.run.finish import finish_run
from dinov2_equi.run.folder import check_run_folder, holds_run, set_aside
from dinov2_equi.run.pictures import picture_hook
from dinov2_equi.train.build import build_datasets, check_colors, check_weight_files, select_device
from dinov2_equi.train.loop import load_finished, train
from dinov2_equi.train.settings import load_run_config, split_words
from dinov2_equi.train.step import NonFiniteLossError
from dinov2_equi.train.stopping import RunStopped

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; flags, further files and overrides may stand in any order."""
    parser = argparse.ArgumentParser(
        description="Train DINOv2 with the equivariance branch.",
        epilog="example:\n  python dinov2_equi/run/train.py --config-file configs/quickstart.yaml "
        f"--output-dir runs/mine train.dataset_path=/data/photos optim.epochs=20\n\n{describe_exit_codes()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML with what differs from the defaults")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE|key=value",
        help="further YAML files with what differs from those before them; configuration keys with the value to use, "
        "e.g. train.seed=1",
    )
    parser.add_argument(
        "--output-dir", "--output_dir", metavar="DIR", help="run folder; default: train.output_dir of the configuration"
    )
    parser.add_argument("--no-resume", action="store_true", help="set an earlier run in the folder aside, start anew")
    parser.add_argument("--eval-only", action="store_true", help="do not train: report on the newest checkpoint")
    sweep = "one array of SLURM jobs: a run for each file, read after all others, in its folder below --output-dir"
    parser.add_argument("--sweep", nargs="+", default=[], metavar="FILE", help=sweep)
    launch.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = get_parser()
    args = parser.parse_intermixed_args(argv)
    if args.eval_only and args.no_resume:
        parser.error("--eval-only looks at the run that --no-resume would set aside; give one of the two")
    keep_freed_memory()
    try:
        _run(args)
    except NonFiniteLossError as error:
        return _fail(error, EXIT_NON_FINITE)
    # ConfigError, DatasetError, ResumeError and weights that do not fit are ValueErrors that explain themselves.
    except (ValueError, CheckpointError, OSError) as error:
        logger.debug("stopped", exc_info=True)
        return _fail(error, EXIT_USER_ERROR)
    except RunStopped as stopped:
        return _fail(stopped, EXIT_INTERRUPTED if stopped.signal == signal.SIGINT else EXIT_STOPPED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", EXIT_INTERRUPTED)
    return EXIT_DONE


def _fail(reason: object, code: int) -> int:
    message = str(reason)
    if "Original Traceback" in message:  # an error of a loader process arrives with its traceback as text
        message = message.strip().rsplit(f"{type(reason).__name__}: ", 1)[-1]
    sys.stderr.write(f"error: {message}\n")
    return code


def _run(args: argparse.Namespace) -> None:
    sweep_files, sweep_words = split_words(args.sweep)  # overrides behind the files of --sweep are those of all
    further_files, overrides = split_words([*args.words, *sweep_words])
    files = [*([Path(args.config_file)] if args.config_file else []), *further_files]
    for_slurm = launch.is_for_slurm(args)
    if args.sweep:
        _submit_sweep(args, [(file, load_run_config([*files, file], overrides)) for file in sweep_files])
        return
    cfg = load_run_config(files, overrides)
    if for_slurm:
        _submit(args, cfg)
        return
    process = read_launch()
    device = select_device(cfg, process.local_rank)
    with process_group(process, device.type):
        _train_as_one_of_many(args, cfg, device)


def _submit(args: argparse.Namespace, cfg: Config) -> None:
    allocation = launch.allocation_of(args)
    output_dir = _output_dir(args, cfg)
    _prepare_for_queue(args, {output_dir: cfg})
    job = launch.submit(cfg, output_dir, allocation, flags=_flags(args))
    print(f"job {job} was submitted; its log: {launch.log_of(output_dir, job)}")


def _submit_sweep(args: argparse.Namespace, configs: Sequence[tuple[Path, Config]]) -> None:
    allocation = launch.allocation_of(args)
    names = [file.stem for file, _ in configs]
    sweep_dirs = {_output_dir(args, cfg) for _, cfg in configs}
    if not names:
        raise ValueError(f"--sweep takes YAML files, got {' '.join(args.sweep)}")
    if len(set(names)) < len(names) or launch.FOLDER in names:
        raise ValueError(
            "--sweep names the run folders after the files, which must differ from each other and from "
            f"{launch.FOLDER}, got {', '.join(names)}: rename some"
        )
    if len(sweep_dirs) > 1:
        raise ValueError("the files of --sweep name several train.output_dir: give the folder of all by --output-dir")
    (sweep_dir,) = sweep_dirs
    runs = {sweep_dir / file.stem: cfg for file, cfg in configs}
    _prepare_for_queue(args, runs)
    for job, output_dir in zip(launch.submit_sweep(runs, sweep_dir, allocation, flags=_flags(args)), runs, strict=True):
        print(f"job {job} was submitted for {output_dir}; its log: {launch.log_of(sweep_dir, job)}")


def _prepare_for_queue(args: argparse.Namespace, runs: Mapping[Path, Config]) -> None:
    """Find here what would fail in the queue; then set earlier runs aside now, and not at every start of a job."""
    launch.check_slurm()
    for output_dir, cfg in runs.items():
        check_run_folder(output_dir, must_exist=args.eval_only)
        check_weight_files(cfg)
        build_datasets(cfg)
    for output_dir in runs if args.no_resume else ():
        set_aside(output_dir)


def _flags(args: argparse.Namespace) -> list[str]:
    return ["--eval-only"] if args.eval_only else []


def _output_dir(args: argparse.Namespace, cfg: Config) -> Path:
    return Path(args.output_dir or cfg.train.output_dir).expanduser().resolve()


def _train_as_one_of_many(args: argparse.Namespace, cfg: Config, device: torch.device) -> None:
    derived = derive(cfg, world_size=get_world_size())
    output_dir = _output_dir(args, cfg)
    check_run_folder(output_dir, must_exist=args.eval_only)
    if args.no_resume or not holds_run(output_dir):  # a run that goes on no longer needs what it started from
        check_weight_files(cfg)
    dataset, holdout = build_datasets(cfg)  # a wrong path fails here, before any model is built
    check_colors(cfg, dataset)
    if args.no_resume and is_main_process():
        set_aside(output_dir)
    wait_for_all_ranks()
    setup_logging(output_dir, get_rank())
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    _log_start(derived, device, output_dir)
    logger.info("%d training images, %d held back", len(dataset), 0 if holdout is None else len(holdout))
    if args.eval_only:
        state = load_finished(cfg, derived, device=device, output_dir=output_dir)
    else:
        on_picture = picture_hook(cfg, holdout, device)
        state = train(
            cfg,
            derived,
            dataset=dataset,
            device=device,
            output_dir=output_dir,
            on_picture=on_picture,
            on_evaluation=evaluation_hook(cfg, dataset, holdout, device=device, output_dir=output_dir),
        )
    if is_main_process():
        finish_run(cfg, state, dataset=dataset, holdout=holdout, device=device, output_dir=output_dir)
    wait_for_all_ranks()


def _log_start(derived: Derived, device: torch.device, output_dir: Path) -> None:
    logger.info("run folder %s", output_dir)
    logger.info("device %s, torch %s, %d CPU threads", device, torch.__version__, torch.get_num_threads())
    logger.info(describe_backend(device))
    logger.info(
        "%d steps of %d images, peak learning rate %.3g, %s",
        derived.total_steps,
        derived.effective_batch_size,
        derived.lr,
        "one process" if get_world_size() == 1 else f"{get_world_size()} processes",
    )


if __name__ == "__main__":
    sys.exit(main())
