r"""How much frozen features suffer from corrupted images: ImageNet-C, or any folder that lies like it.

    python eval/classification/corruptions.py --weights runs/mine hub:dinov2_vits14 --corrupted IMAGENET_C \
        --train ImageNet:split=TRAIN:root=DIR --val ImageNet:split=VAL:root=DIR

IMAGENET_C holds <corruption>/<severity 1 to 5>/<class>/*.JPEG. The linear classifiers of run.py are trained on clean
images, the best one on the clean validation images is chosen, and it alone answers for all corrupted ones.
Prints one table and writes `results.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.table import Table

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.image_net_variants import CORRUPTED, find_corruptions, image_net_c
from dinov2_equi.data.datasets.make import make_train_and_val
from dinov2_equi.evaluation.classification import Numbers, TaskSettings, fit_sweep
from dinov2_equi.evaluation.corruptions import mean_corruption_error, mean_error
from dinov2_equi.evaluation.eval_model import EvalModel, check_photographs
from dinov2_equi.evaluation.labelled import matching_labels
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.stored_features import StoredFeatures, stored_features
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import DATA_FORMS, FORMS, load_eval_models

DEFAULT_CACHE = Path("~/.cache/dinov2_equi/features")
RESULTS_FILE = "results.json"
CLEAN = "clean"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    add("--corrupted", required=True, type=Path, metavar="DIR", help="<corruption>/<severity>/<class>/ below it")
    add("--data", metavar="FOLDER", help="clean images: train/ and val/, each with one sub-folder a class")
    add("--train", metavar="DATA", help=f"instead of --data, images to learn from: {DATA_FORMS}")
    add("--val", metavar="DATA", help="clean images, by which the classifier is chosen, likewise")
    add("--size", type=int, help="image side, pixels (default: the one each backbone was trained at)")
    add("--epochs", type=int, help="passes of the linear classifiers (default: as in run.py)")
    add("--batch-size", type=int, default=64, help="images in one forward pass (default: 64)")
    add("--num-workers", type=int, default=0, help="processes that decode images (default: 0, in this one)")
    add("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help=f"of features (default: {DEFAULT_CACHE})")
    add("--seed", type=int, default=0, help="of orders and first weights of classifiers (default: 0)")
    add_device(parser)
    add("--output", type=Path, default=Path("corruptions"), metavar="DIR", help="of the results (default: corruptions)")
    return parser.parse_args(argv)


def corrupted_sets(root: Path) -> dict[str, dict[int, ImageDataset]]:
    """Return the images by corruption and severity.

    Raises:
        DatasetError: if nothing lies there as in ImageNet-C; says how it must lie.
    """
    found = find_corruptions(root)
    if not found:
        raise DatasetError(
            f"no corruption found in {root}: expected <corruption>/<severity 1 to 5>/<class>/*.JPEG below it, as in "
            f"{CORRUPTED}"
        )
    return {name: {level: image_net_c(root, name, level) for level in levels} for name, levels in found.items()}


def measure(
    args: argparse.Namespace,
    model: EvalModel,
    clean: tuple[ImageDataset, ImageDataset],
    corrupted: dict[str, dict[int, ImageDataset]],
) -> Numbers:
    """Return the errors of one backbone."""
    train, val = clean

    def features(dataset: ImageDataset) -> StoredFeatures:
        return stored_features(
            model,
            dataset,
            size=args.size or model.image_size,
            folder=args.cache.expanduser(),
            device=args.device,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )

    train_labels, val_labels = matching_labels(train, val)
    settings = TaskSettings(epochs=args.epochs, seed=args.seed, device=args.device)
    fitted = fit_sweep(features(train), train_labels, settings)
    on_clean = fitted.accuracies(features(val), val_labels)
    choice, rate, accuracy = fitted.result(on_clean).best
    best = int(on_clean.argmax())
    errors: dict[str, dict[int, float]] = {}
    with training_progress(sum(map(len, corrupted.values()))) as progress:
        for name, sets in corrupted.items():
            errors[name] = {}
            for level, images in sets.items():
                labels = matching_labels(train, images)[1]
                errors[name][level] = 1 - float(fitted.accuracies(features(images), labels).flatten()[best])
                progress.update(progress.steps_done + 1)
    return {
        CLEAN: 1 - accuracy,
        "classifier": {"features": choice.name, "learning_rate": rate},
        "errors": {name: {str(level): error for level, error in of.items()} for name, of in errors.items()},
        "mean_error": mean_error(errors),
        "mce": mean_corruption_error(errors),
        "settings": dataclasses.asdict(settings),
    }


def run(args: argparse.Namespace) -> dict[str, Numbers]:
    """Return the numbers of every backbone, after writing them to `args.output`."""
    models = load_eval_models(args.weights, size=args.size)
    for model in models:
        check_photographs(model)
        model.check_size(args.size or model.image_size)
    corrupted = corrupted_sets(args.corrupted)
    clean = make_train_and_val(args.data, args.train, args.val)
    numbers: dict[str, Numbers] = {}
    described: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("output", "cache", "seed")}
    for model in models:
        numbers[model.name] = measure(args, model.to(args.device), clean, corrupted)
        model.to("cpu")
        place = args.output / RESULTS_FILE
        write_results(place, numbers, task="corruptions", seed=args.seed, settings=described)
    return numbers


def table_of(numbers: dict[str, Numbers]) -> Table:
    """Return the errors in per cent: clean, the mean, mCE, and every corruption; one column a backbone."""
    table = Table("error, per cent", *numbers)
    lines = {CLEAN: CLEAN, "mean_error": "corrupted, mean", "mce": "mCE"}
    for key, title in lines.items():
        values = [found[key] for found in numbers.values()]
        table.add_row(title, *("" if value is None else f"{100 * value:.1f}" for value in values))
    table.add_section()
    for name in next(iter(numbers.values()))["errors"]:
        of = [found["errors"][name].values() for found in numbers.values()]
        table.add_row(name, *(f"{100 * sum(values) / len(values):.1f}" for values in of))
    return table


def command(args: argparse.Namespace) -> int:
    """Measure everything, and print the table."""
    numbers = run(args)
    get_console().print(table_of(numbers))
    if any(found["mce"] is None for found in numbers.values()):
        print("No mCE: that needs all 15 corruptions of ImageNet-C in all five severities.")
    print(f"written: {args.output / RESULTS_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
