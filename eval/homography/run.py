"""How well can a homography be read from the patch features of two patches? S-COCO, from any folder of images.

    python eval/homography/run.py --weights runs/mine random:runs/mine --train COCO/train2017 --test COCO/val2017
    python eval/homography/run.py --weights hub:dinov2_vits14 --data FOLDER --steps 20000 --backbone-lr 1e-5

Pairs of patches that differ by four moved corners are made on the fly; a head of three convolutions on the features of
both answers with the shifts of the corners. Measured is the mean corner error in pixels, beside that of answering that
nothing moved. FOLDER holds train/ and val/. Writes `results.json`, for each backbone a picture and checkpoints, from
which the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.table import Table

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.make import make_train_and_val
from dinov2_equi.distributed.collectives import largest_of_ranks
from dinov2_equi.distributed.env import get_rank, is_main_process, share_of_batch
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.dense_features import DENSE_FEATURES, check_features
from dinov2_equi.evaluation.eval_model import EvalModel, shared_channels
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.homography import (
    HomographyResult,
    HomographySettings,
    fit_homography,
    pairs_to_measure,
)
from dinov2_equi.evaluation.homography_figure import homography_figure
from dinov2_equi.evaluation.homography_pairs import PairSettings
from dinov2_equi.evaluation.results import folder_name, write_results
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run import launch
from dinov2_equi.run.command import EXIT_DONE, add_device
from dinov2_equi.run.launch import shown_progress
from dinov2_equi.run.load import FORMS, load_eval_models
from dinov2_equi.run.options_file import OptionsFileParser
from dinov2_equi.train.stopping import RunStopped, StopRequest

RESULTS_FILE, FIGURE_FILE = "results.json", "pairs.png"
IDENTITY = "nothing moved"
SPLIT_FOLDERS = (("train", "train2017"), ("val", "val2017", "test"))
_HELP = (
    "Images lie in FOLDER/train/ and FOLDER/val/, nested or flat, or where --train and --test say; S-COCO is made from "
    "those of COCO, train2017/ and val2017/ of https://cocodataset.org/#download"
)
_SHOWN_PAIRS = 5

Numbers = dict[str, Any]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OptionsFileParser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    pairs, own = PairSettings(), HomographySettings()
    data = parser.add_argument_group("pairs").add_argument
    data("--data", metavar="FOLDER", help="with train/ and val/, or COCO's train2017/ and val2017/")
    data("--train", metavar="DATA", help="images to learn from, instead of --data")
    data("--test", metavar="DATA", help="images that are measured on, others than --train")
    height, width = pairs.image_size
    data("--image-size", type=int, nargs=2, default=[height, width], help=f"(default: {height} {width})")
    data("--patch", type=int, default=pairs.patch, help=f"side of the patches, pixels (default: {pairs.patch})")
    shift = f"of a corner along each axis, pixels (default: {pairs.max_shift})"
    data("--max-shift", type=int, default=pairs.max_shift, help=shift)
    data("--test-pairs", type=int, default=own.test_pairs, help=f"default: {own.test_pairs}")
    head = parser.add_argument_group("training").add_argument
    head("--input-size", type=int, help="patches as the backbone sees them, pixels (default: --patch)")
    head("--features", choices=DENSE_FEATURES, default=own.features, help="default: patches; parts of runs alone")
    head("--steps", type=int, default=own.steps, help=f"default: {own.steps}")
    head("--batch-size", type=int, default=own.batch_size, help=f"pairs in a step (default: {own.batch_size})")
    head("--width", type=int, default=own.width, help=f"channels of the head (default: {own.width})")
    head("--lr", type=float, default=own.lr, help=f"of the head (default: {own.lr})")
    head("--backbone-lr", type=float, default=own.backbone_lr, help="of the backbone; 0: frozen (default)")
    head("--seed", type=int, default=own.seed)
    add("--save-every", type=int, default=500, metavar="STEPS", help="between checkpoints (default: 500)")
    add("--num-workers", type=int, default=0, help="processes that make pairs")
    add_device(parser)
    add("--output", type=Path, default=Path("homography"), metavar="DIR", help="default: homography")
    launch.add_arguments(parser)
    return parser


def homography_settings(args: argparse.Namespace) -> HomographySettings:
    """Return the settings.

    Raises:
        ValueError: for settings out of range, or a batch that the processes cannot divide.
    """
    settings = HomographySettings(
        pairs=PairSettings((args.image_size[0], args.image_size[1]), args.patch, args.max_shift),
        input_size=args.input_size,
        features=args.features,
        width=args.width,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        backbone_lr=args.backbone_lr,
        test_pairs=args.test_pairs,
        seed=args.seed,
    )
    settings.check()
    share_of_batch(settings.batch_size, launch.num_processes(args))
    if args.save_every < 1:
        raise ValueError(f"--save-every takes at least 1 step, got {args.save_every}")
    return settings


def as_numbers(result: HomographyResult) -> Numbers:
    """Return the numbers of one backbone, errors in pixels."""
    errors = result.corner_errors
    return {
        "mean_corner_error": result.mean_corner_error,
        "median_corner_error": float(errors.median()),
        "identity_corner_error": result.identity_error,
        "num_test_pairs": len(errors),
        "train_loss": result.losses,
    }


def write_pairs(path: Path, test: ImageDataset, settings: HomographySettings, result: HomographyResult) -> None:
    """Write the picture of pairs from the best to the worst answered one."""
    order = result.corner_errors.argsort().tolist()
    count = min(_SHOWN_PAIRS, len(order))
    chosen = [order[round(index * (len(order) - 1) / max(count - 1, 1))] for index in range(count)]
    pairs = pairs_to_measure(test, settings)
    figure = homography_figure([pairs[number] for number in chosen], result.predicted[chosen])
    write_figure(path, figure)


def measure(
    args: argparse.Namespace,
    model: EvalModel,
    data: tuple[ImageDataset, ImageDataset],
    settings: HomographySettings,
    *,
    on_step: Callable[[int, Losses], None],
    stop: StopRequest,
) -> Numbers:
    """Return the numbers of one backbone, after writing its picture.

    Raises:
        RunStopped: on a signal, once the step is finished and saved.
    """
    folder = args.output / folder_name(model.name)
    done = 0

    def advance(step: int, losses: Losses) -> None:
        nonlocal done
        done = step
        on_step(step, losses)

    result = fit_homography(
        model.to(args.device),
        *data,
        settings,
        folder,
        device=args.device,
        num_workers=args.num_workers,
        save_every=args.save_every,
        on_step=advance,
        asked_to_stop=lambda: stop.signal > 0,
    )
    if result is None:
        raise RunStopped(largest_of_ranks(stop.signal, args.device), done)
    model.to("cpu")
    if is_main_process():
        write_pairs(folder / FIGURE_FILE, data[1], settings, result)
    return as_numbers(result)


def find_images(args: argparse.Namespace, channels: ChannelFormat | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Return images to learn from and images to measure on.

    Raises:
        DatasetError: they are not there: says where they were sought, how they may lie, where to get those of S-COCO.
    """
    if bool(args.train) != bool(args.test) or bool(args.data) == bool(args.train):
        raise DatasetError("give --data FOLDER alone, or both --train and --test")
    train, test = args.train, args.test
    if args.data:
        root = Path(args.data).expanduser()
        train, test = (next((str(root / n) for n in names if (root / n).is_dir()), "") for names in SPLIT_FOLDERS)
        if not train or not test:
            sought = " and ".join(" or ".join(str(root / name) for name in names) for names in SPLIT_FOLDERS)
            raise DatasetError(f"looked for {sought}. {_HELP}")
    try:
        return make_train_and_val(None, train, test, channels)
    except DatasetError as error:
        raise DatasetError(f"{error} {_HELP}") from error


def load_all(args: argparse.Namespace) -> tuple[HomographySettings, tuple[ImageDataset, ImageDataset], list[EvalModel]]:
    """Return settings, images to learn from and to measure on, and backbones.

    Raises:
        ValueError: for settings out of range, data or weights that are not there.
        OSError: for weights that cannot be read.
    """
    settings = homography_settings(args)
    models = load_eval_models(args.weights)
    data = find_images(args, shared_channels(models))
    for model in models:
        check_features(model, settings.features)
    return settings, data, models


def run(args: argparse.Namespace) -> dict[str, Numbers]:
    """Return the numbers of every backbone, after writing them to `args.output`."""
    settings, data, models = load_all(args)
    setup_logging(args.output, get_rank())
    numbers: dict[str, Numbers] = {}
    total = len(models) * settings.steps
    with StopRequest().listening() as stop, shown_progress(total, images_per_step=settings.batch_size) as progress:
        for position, model in enumerate(models):

            def advance(step: int, losses: Losses, before: int = position * settings.steps) -> None:
                progress.update(before + step, losses)

            numbers[model.name] = measure(args, model, data, settings, on_step=advance, stop=stop)
            if is_main_process():
                described = {key: value for key, value in launch.described(args).items() if key != "seed"}
                described["settings"] = dataclasses.asdict(settings)
                write_results(
                    args.output / RESULTS_FILE, numbers, task="homography", seed=args.seed, settings=described
                )
    return numbers


def table_of(numbers: dict[str, Numbers]) -> Table:
    """Return the corner errors, one line a backbone; the last is that of answering that nothing moved."""
    table = Table("", "mean corner error", "median")
    for name, found in numbers.items():
        table.add_row(name, f"{found['mean_corner_error']:.2f}", f"{found['median_corner_error']:.2f}")
    table.add_row(IDENTITY, f"{next(iter(numbers.values()))['identity_corner_error']:.2f}", "")
    return table


def report(args: argparse.Namespace) -> int:
    """Measure, and say what was found and where it lies."""
    numbers = run(args)
    if is_main_process():
        get_console().print(table_of(numbers))
        print(f"Pixels of a patch of {args.patch}. Pictures: {args.output}/*/{FIGURE_FILE}")
        print(f"written: {args.output / RESULTS_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return launch.run_launched(report, get_parser(), argv, script=Path(__file__), check=load_all)


if __name__ == "__main__":
    sys.exit(main())
