"""Measure the teachers that a training exports, in a process of their own: on another machine, or after the training.

    python dinov2_equi/run/evaluate.py runs/mine
    python dinov2_equi/run/evaluate.py runs/mine --follow evaluation.tasks=[knn] evaluation.val_dataset_path=FOLDER

Each teacher in RUN/eval/training_N is measured once, with what `evaluation.tasks` of the run's configuration names. The
numbers go to RUN/evaluation_metrics.json as those of the training itself would, and the best teacher to RUN/best where
`evaluation.best_metric` is set. Start the training with `evaluation.in_process=false`: it then exports and does not
measure. After a stop the same command goes on with the teachers that are left.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dinov2_equi.config.derive import derive
from dinov2_equi.config.schema import Config
from dinov2_equi.logging.metrics import EVALUATION_NAME, EvaluationWriter, read_metrics
from dinov2_equi.run.command import EXIT_DONE, EXIT_FAILED, command_parser, run_command
from dinov2_equi.run.evaluation_hook import Measurements, keep_best, measure_all, prepare_measurements
from dinov2_equi.run.load import CONFIG_FILE, load_teacher
from dinov2_equi.train.build import build_datasets, select_device
from dinov2_equi.train.export import BACKBONE_FILE
from dinov2_equi.train.loop import exported_teacher
from dinov2_equi.train.settings import load_run_config

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run, finished or going on")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys to change, such as evaluation.tasks=[knn]"
    )
    parser.add_argument(
        "--follow", action="store_true", help="wait for further teachers until the last one is measured"
    )
    parser.add_argument(
        "--poll-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="between two looks with --follow (default: 30)",
    )
    return parser.parse_intermixed_args(argv)


def expected_steps(cfg: Config) -> list[int]:
    """Return after which steps the training exports its teacher.

    Raises:
        ValueError: if it never does.
    """
    period = cfg.evaluation.eval_period_iterations
    total = derive(cfg, world_size=1).total_steps
    if not 0 < period <= total:
        raise ValueError(
            f"evaluation.eval_period_iterations={period}: this training of {total} steps exports no teacher on its "
            f"way; train with a period from 1 to {total}"
        )
    return list(range(period, total + 1, period))


def steps_to_measure(cfg: Config, folder: Path) -> list[int]:
    """Return the steps whose teachers are there, and not in the file of evaluations yet."""
    path = folder / EVALUATION_NAME
    done = {int(line["iteration"]) + 1 for line in read_metrics(path)} if path.is_file() else set()
    return [
        step
        for step in expected_steps(cfg)
        if step not in done and (exported_teacher(folder, step) / BACKBONE_FILE).is_file()
    ]


def evaluate(cfg: Config, folder: Path, measurements: Measurements, device: torch.device, step: int) -> bool:
    """Measure the teacher after a step and write what was found; returns whether nothing failed."""
    backbone = load_teacher(cfg, exported_teacher(folder, step)).to(device)
    scalars, failed = measure_all(measurements, backbone, step=step, device=device)
    with EvaluationWriter(folder, tensorboard=cfg.logging.tensorboard) as writer:
        writer.write_evaluation(step - 1, {f"eval/{name}": value for name, value in scalars.items()})
    print(f"after step {step}: {', '.join(f'{name} {value:.3f}' for name, value in scalars.items())}", flush=True)
    keep_best(cfg.evaluation.best_metric, scalars, folder, step)
    return not failed


def command(args: argparse.Namespace) -> int:
    """Measure what there is, and with --follow what comes.

    Raises:
        ValueError: if the folder is no run, exports no teacher, or nothing of its tasks can be measured.
        OSError: if a teacher cannot be read.
    """
    folder = args.run.expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is no run: it holds no {CONFIG_FILE}; give the --output-dir of a training")
    cfg = load_run_config(folder / CONFIG_FILE, args.overrides)
    last = expected_steps(cfg)[-1]
    device = select_device(cfg)
    measurements = prepare_measurements(cfg, *build_datasets(cfg), device=device)
    if not measurements:
        raise ValueError(
            f"nothing of evaluation.tasks={list(cfg.evaluation.tasks)} can be measured: knn and linear need labelled "
            "images, equivariance held-back ones; name evaluation.train_dataset_path and evaluation.val_dataset_path"
        )
    is_sound, count = True, 0
    while True:
        for step in steps_to_measure(cfg, folder):
            is_sound &= evaluate(cfg, folder, measurements, device, step)
            count += 1
        if not args.follow or _is_measured(folder, last):
            break
        time.sleep(args.poll_seconds)
    print(f"{count} teachers measured: {folder / EVALUATION_NAME}")
    return EXIT_DONE if is_sound else EXIT_FAILED


def _is_measured(folder: Path, step: int) -> bool:
    path = folder / EVALUATION_NAME
    return path.is_file() and any(line["iteration"] == step - 1 for line in read_metrics(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run_command(command, args)


if __name__ == "__main__":
    sys.exit(main())
