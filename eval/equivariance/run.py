"""What do frozen features know of a transformation of the image, and do they change with it?

    python eval/equivariance/run.py --weights runs/quickstart random --data FOLDER
    python eval/equivariance/run.py --weights hub:dinov2_vits14 timm:vit_small_patch16_dinov3 --data FOLDER
    python eval/equivariance/run.py --weights teacher_checkpoint.pth --train FOLDER_1 --test FOLDER_2

For each family of transforms a small network regresses the parameters from the features of an image and of its copy
(R2: 1 perfect, 0 no better than the mean). Also the cosine similarity of the two, and k-NN accuracy where the images
have classes. Writes `results.json` and `equivariance.png`. FOLDER holds train/ and val/, or images that are split into
two halves; without any data a few hundred tiny grey photographs stand in.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])


from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.holdout import hold_back
from dinov2_equi.data.datasets.make import VAL_FOLDERS, make_dataset
from dinov2_equi.data.datasets.sample_photos import SamplePhotos
from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.registry import FAMILIES, NEED_COLOR, build_family
from dinov2_equi.equi.geometry import FILLS
from dinov2_equi.evaluation.equivariance import (
    ModelScores,
    ProbeSettings,
    available_features,
    count_steps,
    measure_equivariance,
    scores_as_numbers,
)
from dinov2_equi.evaluation.equivariance_figure import equivariance_figure
from dinov2_equi.evaluation.equivariance_tables import equivariance_tables
from dinov2_equi.evaluation.eval_model import HALF_FEATURES, PLAIN_FEATURES, EvalModel, shared_channels
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.probe_images import ProbeImages, load_probe_images
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import CONFIG_FILE, FORMS, is_run, load_eval_models

logger = logging.getLogger(__name__)

DEFAULT_FAMILIES = ("rotation", "translation", "se2", "color", "blur")

RESULTS_FILE, FIGURE_FILE = "results.json", "equivariance.png"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    data = parser.add_argument_group("images")
    data.add_argument("--data", metavar="FOLDER", help="with train/ and val/, or images that are split into halves")
    data.add_argument("--train", metavar="DATA", help="images the regression learns from, instead of --data")
    data.add_argument("--test", metavar="DATA", help="images it is tested on, others than --train")
    data.add_argument("--split-seed", type=int, default=0, help="which images make which half (default: 0)")
    data.add_argument("--train-images", type=int, default=4500, help="at most (default: 4500)")
    data.add_argument("--test-images", type=int, default=1000, help="at most (default: 1000)")
    data.add_argument("--size", type=int, help="image side in pixels (default: the one each backbone was trained at)")
    data.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    probe = parser.add_argument_group("probe")
    probe.add_argument(
        "--families",
        nargs="+",
        default=None,
        choices=tuple(FAMILIES),
        metavar="FAMILY",
        help=f"of {', '.join(FAMILIES)} (default: {' '.join(DEFAULT_FAMILIES)})",
    )
    probe.add_argument(
        "--features",
        nargs="+",
        default=list(PLAIN_FEATURES + HALF_FEATURES),
        choices=PLAIN_FEATURES + HALF_FEATURES,
        metavar="FEATURES",
        help=f"of {', '.join(PLAIN_FEATURES + HALF_FEATURES)}; the halves of runs alone (default: all)",
    )
    probe.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    probe.add_argument("--draws", type=int, default=4, help="transforms of each image (default: 4)")
    probe.add_argument("--epochs", type=int, default=20, help="passes of the regression (default: 20)")
    probe.add_argument(
        "--fractions",
        type=float,
        nargs="*",
        default=[0.25, 0.5, 0.75],
        metavar="SHARE",
        help="of the pairs, for the curve over their number; nothing: no curve (default: 0.25 0.5 0.75)",
    )
    probe.add_argument("--hidden", type=int, default=1024, help="units of its two hidden layers (default: 1024)")
    probe.add_argument("--fill", choices=FILLS, help="what lies outside an image (default: as each run was trained)")
    probe.add_argument("--k", type=int, nargs="+", default=[10, 20], help="neighbours of the k-NN (default: 10 20)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in one forward pass (default: 64)")
    add_device(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: eval/equivariance in the run where it is one, else equivariance here",
    )
    args = parser.parse_args(argv)
    if args.output is None:
        runs = run_folders(args.weights)
        args.output = runs[0] / "eval" / "equivariance" if len(runs) == 1 else Path("equivariance")
    return args


def run_folders(weights: list[str]) -> list[Path]:
    """Return those of the weights that are training runs."""
    return [Path(spec).expanduser() for spec in weights if is_run(spec)]


def choose_data(args: argparse.Namespace, channels: ChannelFormat | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Return disjoint images to train and to test on.

    Raises:
        DatasetError: if the data are not there, or it is not said which are to be tested on.
    """
    if args.train or args.test:
        if args.data or not (args.train and args.test):
            raise DatasetError("give --data alone, or both --train and --test")
        return make_dataset(args.train, channels), make_dataset(args.test, channels)
    if not args.data:
        return make_dataset("small_photos:split=TRAIN", channels), make_dataset("small_photos:split=TEST", channels)
    root = Path(args.data).expanduser()
    if (root / "train").is_dir():
        found = [root / name for name in VAL_FOLDERS if (root / name).is_dir()]
        if not found:
            raise DatasetError(f"{root} has train/ but none of {', '.join(VAL_FOLDERS)}; give --train and --test")
        return make_dataset(str(root / "train"), channels), make_dataset(str(found[0]), channels)
    dataset = make_dataset(args.data, channels)
    if isinstance(dataset, SamplePhotos):
        raise DatasetError(
            "regions of one photograph would be in both halves; give --train sample_photos "
            "--test sample_photos:split=VAL"
        )
    return hold_back(dataset, 0.5, args.split_seed)


def load_images(args: argparse.Namespace, models: list[EvalModel]) -> dict[int, ProbeImages]:
    """Return the images in every size that a backbone asks for."""
    sizes = dict.fromkeys(args.size or model.image_size for model in models)
    for model in models:
        model.check_size(args.size or model.image_size)
    train, test = choose_data(args, shared_channels(models))
    return {
        size: load_probe_images(
            train,
            test,
            size=size,
            max_train=args.train_images,
            max_test=args.test_images,
            num_workers=args.num_workers,
        )
        for size in sizes
    }


def choose_families(args: argparse.Namespace, images: ProbeImages) -> list[str]:
    """Return the names of the families to measure: on grey images none that needs colour.

    Raises:
        ValueError: if such a family is asked for by name.
    """
    names = args.families or DEFAULT_FAMILIES
    blind = [name for name in names if name in NEED_COLOR] if images.is_grey else []
    if blind and args.families:
        rest = [name for name in FAMILIES if name not in NEED_COLOR]
        raise ValueError(f"the images are grey and show no {', '.join(blind)}; choose among {', '.join(rest)}")
    if blind:
        print(f"the images are grey: {', '.join(blind)} is left out")
    return [name for name in dict.fromkeys(names) if name not in blind]


def family_ranges(args: argparse.Namespace, model: EvalModel) -> FamilySettings:
    """Return the ranges of the transforms: those of the run, else the published ones; with the wanted fill."""
    ranges = model.families or FamilySettings()
    return dataclasses.replace(ranges, fill=args.fill) if args.fill else ranges


def probe_settings(args: argparse.Namespace) -> ProbeSettings:
    """Return the settings of the probe; the curve is measured with class and mean patch token where they are wanted."""
    settings = ProbeSettings(
        features=args.features,
        seeds=args.seeds,
        draws=args.draws,
        epochs=args.epochs,
        hidden=args.hidden,
        fractions=args.fractions,
        curve_features="both" if "both" in args.features else args.features[0],
        ks=args.k,
        batch_size=args.batch_size,
    )
    settings.check()
    return settings


def measure(
    args: argparse.Namespace, models: list[EvalModel], images: dict[int, ProbeImages], families: list[str]
) -> dict[str, ModelScores]:
    """Return what is found of each backbone, by name, while a progress bar shows how far it is."""
    settings = probe_settings(args)
    sets = {model.name: images[args.size or model.image_size] for model in models}
    total = sum(count_steps(model, sets[model.name], settings, len(families)) for model in models)
    scores = {}
    with training_progress(total) as progress:

        def advance() -> None:
            progress.update(progress.steps_done + 1)

        for model in models:
            ranges = family_ranges(args, model)
            scores[model.name] = measure_equivariance(
                model.to(args.device),
                sets[model.name],
                {name: build_family(name, ranges) for name in families},
                settings,
                device=args.device,
                on_step=advance,
            )
            model.to("cpu")
    return scores


def describe(
    args: argparse.Namespace, models: list[EvalModel], images: dict[int, ProbeImages], families: list[str]
) -> dict[str, Any]:
    """Return the command line and what it left open: sizes, numbers of images, ranges."""
    first = next(iter(images.values()))
    chosen = {
        "families": families,
        "num_train_images": len(first.train),
        "num_test_images": len(first.test),
        "models": {
            model.name: {
                "size": args.size or model.image_size,
                "patch_size": model.patch_size,
                "mean": model.mean,
                "std": model.std,
                "ranges": dataclasses.asdict(family_ranges(args, model)),
            }
            for model in models
        },
    }
    return {key: value for key, value in vars(args).items() if key != "output"} | chosen


def run(args: argparse.Namespace) -> dict[str, ModelScores]:
    """Return what was measured, after writing numbers and figure to `args.output`."""
    settings = probe_settings(args)
    models = load_eval_models(args.weights, size=args.size)
    for model in models:
        available_features(model, settings)
    images = load_images(args, models)
    families = choose_families(args, next(iter(images.values())))
    setup_logging(args.output)
    if len({family_ranges(args, model) for model in models}) > 1:
        logger.warning("the backbones are asked about different ranges of transforms: compare their numbers with care")
    scores = measure(args, models, images, families)
    runs = run_folders(args.weights)
    write_results(
        args.output / RESULTS_FILE,
        {name: scores_as_numbers(found) for name, found in scores.items()},
        task="equivariance",
        seed=args.seeds[0],
        config_text=(runs[0] / CONFIG_FILE).read_text(encoding="utf-8") if len(runs) == 1 else None,
        settings=describe(args, models, images, families),
    )
    figure = equivariance_figure(scores, settings.curve_features)
    write_figure(args.output / FIGURE_FILE, figure)
    return scores


def command(args: argparse.Namespace) -> int:
    """Measure everything, and print the tables."""
    scores = run(args)
    console = get_console()
    for name, found in scores.items():
        for title, table in equivariance_tables(found, probe_settings(args).curve_features).items():
            console.print(f"\n{name}\n{title}", markup=False, highlight=False)
            console.print(table)
    console.print(
        f"written: {args.output / RESULTS_FILE}, {args.output / FIGURE_FILE}", soft_wrap=True, highlight=False
    )
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
