r"""What frozen features know of the class of an image: k-NN, linear, logistic regression, few-shot, retrieval.

    python eval/classification/run.py --weights runs/mine hub:dinov2_vits14 --data FOLDER
    python eval/classification/run.py --weights runs/mine random --data FOLDER --tasks knn linear --features patch_mean
    python eval/classification/run.py --weights w.pth --train ImageNet:split=TRAIN:root=DIR \
        --val ImageNet:split=VAL:root=DIR

FOLDER holds train/ and val/, each with one sub-folder a class. The features are computed once and kept in --cache.
Prints one table and writes `results.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from rich.table import Table
from torch import Tensor

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.make import make_train_and_val
from dinov2_equi.evaluation.accepted_labels import read_real_labels
from dinov2_equi.evaluation.classification import (
    ACCEPT_SEVERAL,
    LEAST_EPOCHS,
    LEAST_STEPS,
    TASKS,
    LabelledFeatures,
    Numbers,
    TaskSettings,
)
from dinov2_equi.evaluation.eval_model import PLAIN_FEATURES, EvalModel, shared_channels
from dinov2_equi.evaluation.labelled import matching_labels
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.stored_features import stored_features
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.run.command import EXIT_DONE, add_device, add_knn_devices, command_parser, run_command
from dinov2_equi.run.load import DATA_FORMS, FORMS, load_eval_models

DEFAULT_CACHE = Path("~/.cache/dinov2_equi/features")
RESULTS_FILE = "results.json"


class Labels(NamedTuple):
    """What is right for each image."""

    train: Tensor
    """[R] int64."""

    val: Tensor
    """[n] int64; with ReaL's labels [n, C] bool, the classes that are accepted."""

    val_rows: Tensor | None
    """[n] int64, the validation images that have labels; None: all."""


def words(numbers: Sequence[int]) -> str:
    """Return numbers as a command line has them."""
    return " ".join(map(str, numbers))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    names = ", ".join(TASKS)
    add("--tasks", nargs="+", choices=tuple(TASKS), metavar="TASK", help=f"of {names} (default: all that are possible)")
    data = parser.add_argument_group("images").add_argument
    data("--data", metavar="FOLDER", help="with train/ and val/, each with one sub-folder a class")
    data("--train", metavar="DATA", help=f"instead of --data, images to learn from: {DATA_FORMS}")
    data("--val", metavar="DATA", help="images that are classified, likewise")
    real = "real.json: accepted classes of ImageNet's validation images, for knn, linear and log_regression"
    data("--real-labels", type=Path, metavar="FILE", help=real)
    data("--size", type=int, help="image side, pixels (default: the one each backbone was trained at)")
    data("--num-workers", type=int, default=0, help="processes that decode images (default: 0, in this one)")
    data("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help=f"of features (default: {DEFAULT_CACHE})")
    own = TaskSettings()
    task = parser.add_argument_group("tasks").add_argument
    task(
        "--features",
        choices=PLAIN_FEATURES,
        default=own.features,
        help="class token, mean patch token or both; of all tasks but linear (default: cls)",
    )
    task("--k", type=int, nargs="+", default=list(own.ks), help=f"neighbours of k-NN (default: {words(own.ks)})")
    passes = f"passes of the linear classifiers (default: {LEAST_EPOCHS}, or what {LEAST_STEPS} steps need)"
    task("--epochs", type=int, help=passes)
    as_dinov2 = "train the linear classifiers on the features as they are, as DINOv2 does, not standardised"
    task("--no-standardize", action="store_true", help=as_dinov2)
    task(
        "--shots",
        type=int,
        nargs="+",
        default=list(own.shots),
        help=f"images a class in the few-shot task (default: {words(own.shots)})",
    )
    task("--draws", type=int, default=own.num_draws, help=f"how often they are drawn anew (default: {own.num_draws})")
    only = "answer with classes of the validation images alone, as for ImageNet-A and -R"
    task("--only-val-classes", action="store_true", help=only)
    task("--seed", type=int, default=0, help="of orders, draws and first weights of classifiers (default: 0)")
    add("--batch-size", type=int, default=64, help="images in one forward pass (default: 64)")
    add_device(parser)
    add_knn_devices(parser)
    add(
        "--output",
        type=Path,
        default=Path("classification"),
        metavar="DIR",
        help="folder of the results (default: classification)",
    )
    args = parser.parse_args(argv)
    if args.tasks is None:
        args.tasks = list(TASKS if args.real_labels is None else ACCEPT_SEVERAL)
    return args


def read_labels(args: argparse.Namespace, train: ImageDataset, val: ImageDataset) -> Labels:
    """Return the labels of both sets, and which validation images are scored: with ReaL's labels, not all are.

    Raises:
        ValueError: for a task that knows a single label an image, or labels that do not fit the images.
        OSError: if there is no such file of labels.
    """
    if args.real_labels is None:
        train_labels, val_labels = matching_labels(train, val)
        return Labels(train_labels, val_labels, None)
    single = [task for task in args.tasks if task not in ACCEPT_SEVERAL]
    if single:
        raise ValueError(f"--real-labels is for {', '.join(ACCEPT_SEVERAL)}; leave {', '.join(single)} out of --tasks")
    if train.targets is None:
        raise ValueError("the training images have no classes; give a folder with one sub-folder a class")
    rows, accepted = read_real_labels(args.real_labels, val, len(train.classes))
    return Labels(torch.tensor(train.targets), accepted, rows)


def extract(args: argparse.Namespace, models: list[EvalModel]) -> dict[str, LabelledFeatures]:
    """Return the features of all backbones by name, with a progress bar where they are not on disk yet."""
    sets = make_train_and_val(args.data, args.train, args.val, shared_channels(models))
    labels = read_labels(args, *sets)
    for model in models:
        model.check_size(args.size or model.image_size)
    passes = sum(math.ceil(len(dataset) / args.batch_size) for dataset in sets)
    features = {}
    with training_progress(len(models) * passes) as progress:

        def advance() -> None:
            progress.update(progress.steps_done + 1)

        for number, model in enumerate(models, start=1):
            train, val = (
                stored_features(
                    model.to(args.device),
                    dataset,
                    size=args.size or model.image_size,
                    folder=args.cache.expanduser(),
                    device=args.device,
                    batch_size=args.batch_size,
                    num_workers=args.num_workers,
                    on_batch=advance,
                )
                for dataset in sets
            )
            model.to("cpu")
            if labels.val_rows is not None:
                val = val.take(labels.val_rows.numpy())
            features[model.name] = LabelledFeatures(train, labels.train, val, labels.val)
            progress.update(number * passes)
    return features


def task_settings(args: argparse.Namespace) -> TaskSettings:
    """Return the settings of the tasks."""
    return TaskSettings(
        features=args.features,
        ks=args.k,
        epochs=args.epochs,
        standardize=not args.no_standardize,
        shots=args.shots,
        num_draws=args.draws,
        only_test_classes=args.only_val_classes,
        seed=args.seed,
        device=args.device,
        knn_devices=args.knn_devices,
    )


def run(args: argparse.Namespace) -> dict[str, dict[str, Numbers]]:
    """Return the numbers of every backbone and task, after writing them to `args.output`."""
    models = load_eval_models(args.weights, size=args.size)
    settings = task_settings(args)
    numbers: dict[str, dict[str, Numbers]] = {}
    for name, features in extract(args, models).items():
        numbers[name] = {task: TASKS[task].measure(features, settings) for task in args.tasks}
        sizes: dict[str, Any] = {model.name: args.size or model.image_size for model in models}
        described = {key: value for key, value in vars(args).items() if key not in ("output", "cache", "seed")}
        write_results(
            args.output / RESULTS_FILE,
            numbers,
            task="classification",
            seed=args.seed,
            settings=described | {"sizes": sizes, "tasks_settings": dataclasses.asdict(settings)},
        )
    return numbers


def table_of(numbers: dict[str, dict[str, Numbers]], tasks: list[str]) -> Table:
    """Return the number of each task that a table shows, one line a backbone, in per cent."""
    table = Table("", *(TASKS[task].title for task in tasks))
    for name, found in numbers.items():
        table.add_row(name, *(f"{100 * TASKS[task].headline(found[task]):.1f}" for task in tasks))
    return table


def command(args: argparse.Namespace) -> int:
    """Measure everything, and print the table."""
    numbers = run(args)
    get_console().print(table_of(numbers, args.tasks))
    print("Per cent. k-NN: the best k; linear: the best classifier on these images; few-shot: the most images a class.")
    print(f"written: {args.output / RESULTS_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
