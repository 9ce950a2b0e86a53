"""Do patch features move with the content of the image? Without a probe, labels or keypoints.

    python eval/homography/dense_equivariance.py --weights runs/mine random:runs/mine --data FOLDER
    python eval/homography/dense_equivariance.py --weights hub:dinov2_vits14 --data FOLDER --families rotation

Features of the transformed image are compared, place by place, with the features of the image moved as its content was
(mean cosine, by family of transforms), and as controls with those left where they were and those of other images.
Writes `results.json`, and for each backbone a picture of both feature maps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.equi.families.base import FamilySettings, TransformFamily
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, NEED_COLOR, build_family
from dinov2_equi.evaluation.dense_equivariance import compare_maps, dense_equivariance
from dinov2_equi.evaluation.dense_features import DENSE_FEATURES, at_image_size, check_features
from dinov2_equi.evaluation.eval_model import EvalModel, shared_channels
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.pictures import pca_colors, pca_figure
from dinov2_equi.evaluation.results import folder_name, write_results
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import FORMS, load_eval_models

RESULTS_FILE, FIGURE_FILE = "results.json", "features.png"
KNOWN_FAMILIES = tuple(name for name in FAMILIES if name != MIXTURE)
DEFAULT_FAMILIES = ("rotation", "translation", "se2", "scale", "perspective", "color", "blur")
_SHOWN_IMAGES = 4

Numbers = dict[str, dict[str, float]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    add("--data", required=True, metavar="DATA", help="a folder of images, or any data set of the training config")
    add("--images", type=int, default=256, help="at most, evenly spread over the data (default: 256)")
    add("--size", type=int, help="image side, pixels (default: the one each backbone was trained at)")
    names = ", ".join(KNOWN_FAMILIES)
    families = f"of {names} (default: {' '.join(DEFAULT_FAMILIES)})"
    add("--families", nargs="+", choices=KNOWN_FAMILIES, metavar="NAME", help=families)
    add("--features", choices=DENSE_FEATURES, default="patches", help="default: patches; the parts of runs alone")
    add("--seed", type=int, default=0, help="of the transforms")
    add("--batch-size", type=int, default=16, help="images in one forward pass (default: 16)")
    add_device(parser)
    add("--output", type=Path, default=Path("dense_equivariance"), metavar="DIR", help="default: dense_equivariance")
    return parser.parse_args(argv)


def choose_families(args: argparse.Namespace, channels: ChannelFormat | None) -> list[str]:
    """Return the names of the families to measure: on other images than photographs none that needs colour.

    Raises:
        ValueError: if such a family is asked for by name.
    """
    blind = [name for name in args.families or DEFAULT_FAMILIES if name in NEED_COLOR and channels is not None]
    if blind and args.families:
        raise ValueError(f"{channels} show no {', '.join(blind)}: leave it out of --families")
    return [name for name in args.families or DEFAULT_FAMILIES if name not in blind]


def families_of(args: argparse.Namespace, model: EvalModel) -> dict[str, TransformFamily]:
    """Return the families by name, in the ranges that a run was trained with, else the published ones."""
    return {name: build_family(name, model.families or FamilySettings()) for name in args.families}


def feature_figure(args: argparse.Namespace, model: EvalModel, images: Tensor) -> Figure:
    """Return transformed images above both feature maps, in colours that mean the same in both.

    Expected are the features of the images moved as the first family moves the images; found those of the moved images.
    """
    family = next(iter(families_of(args, model).values()))
    few = images[:_SHOWN_IMAGES].to(args.device)
    theta = family.draw(len(few), torch.Generator().manual_seed(args.seed)).float()
    maps = compare_maps(model, few, family, theta, features=args.features)
    both = torch.cat([maps.expected, maps.found]).flatten(2).transpose(1, 2)  # [2 * n, N, D]
    colours = pca_colors(both, (maps.found.shape[2], maps.found.shape[3]))
    expected, found = (part * maps.covered.cpu()[..., None] for part in colours.chunk(2))
    rows = {"expected": expected, "found": found}
    return pca_figure(family.apply(few, theta), rows)


def measure(args: argparse.Namespace, models: list[EvalModel]) -> dict[str, Numbers]:
    """Return the cosines of every backbone by family, after writing its picture."""
    channels = shared_channels(models)
    args.families = choose_families(args, channels)
    dataset = make_dataset(args.data, channels)
    count = min(args.images, len(dataset))
    if count < 2 or args.batch_size < 2:
        raise ValueError(f"expected at least two images, and two in a batch; got {count} and {args.batch_size}")
    setup_logging(args.output)
    numbers: dict[str, Numbers] = {}
    with training_progress(len(models) * len(args.families) * math.ceil(count / args.batch_size)) as progress:
        for model in models:
            size = args.size or model.image_size
            images = eval_images(dataset, size, count)
            sized = at_image_size(model, (size, size)).to(args.device)
            numbers[model.name] = dense_equivariance(
                sized,
                images,
                families_of(args, model),
                features=args.features,
                seed=args.seed,
                batch_size=args.batch_size,
                device=args.device,
                on_batch=lambda: progress.update(min(progress.steps_done + 1, progress.total_steps)),
            )
            folder = args.output / folder_name(model.name)
            folder.mkdir(parents=True, exist_ok=True)
            write_figure(folder / FIGURE_FILE, feature_figure(args, sized, images))
            model.to("cpu")
    return numbers


def run(args: argparse.Namespace) -> dict[str, Numbers]:
    """Return the numbers of every backbone, after writing them to `args.output`."""
    models = load_eval_models(args.weights)
    for model in models:
        check_features(model, args.features)
        model.check_size(args.size or model.image_size)
    numbers = measure(args, models)
    ranges = {model.name: dataclasses.asdict(model.families or FamilySettings()) for model in models}
    described = {key: value for key, value in vars(args).items() if key not in ("output", "seed")}
    write_results(
        args.output / RESULTS_FILE,
        numbers,
        task="dense_equivariance",
        seed=args.seed,
        settings=described | {"ranges": ranges},
    )
    return numbers


def table_of(numbers: dict[str, Numbers]) -> Table:
    """Return the centred cosines, one line a backbone and family."""
    table = Table("", "family", "moved", "left in place", "other image")
    for name, families in numbers.items():
        for family, found in families.items():
            values = (found[f"{label}_centred"] for label in ("moved", "unmoved", "other_image"))
            table.add_row(name, family, *(f"{value:.3f}" for value in values))
    return table


def report(args: argparse.Namespace) -> int:
    """Measure, and say what was found and where it lies."""
    numbers = run(args)
    get_console().print(table_of(numbers))
    print("Cosine after the mean feature is taken off; 1: features move exactly as the image does.")
    print(f"written: {args.output / RESULTS_FILE}; pictures: {args.output}/*/{FIGURE_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(report, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
