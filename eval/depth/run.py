"""How well depth can be read from a backbone: train a head on images with depth maps, and measure it.

    python eval/depth/run.py --weights runs/mine --data FOLDER --config eval/depth/configs/small.yaml
    python eval/depth/run.py --weights hub:dinov2_vits14 --data NYU --layout nyu --set head=linear4
    python eval/depth/run.py --weights random:vit_small/14 --data FOLDER --set head=dpt steps=500 lr=3e-4

FOLDER holds images and 16-bit depth PNGs in millimetres: images/ and depth/, or a.color.jpg beside a.depth.png.
Writes `results.json`, `predictions.png` and checkpoints; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dinov2_equi.data.datasets.depth_sets import CROPS, LAYOUTS, DepthSet, make_depth_set
from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.evaluation.dense.depth import (
    DepthAugmentation,
    DepthModel,
    DepthSample,
    DepthSettings,
    constant_depth_metrics,
    evaluate_depth,
)
from dinov2_equi.evaluation.dense.pictures import chosen_images, depth_figure
from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.dense.training import Losses, TrainingSamples
from dinov2_equi.evaluation.figures import figure_png
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.run.dense_task import (
    PICTURE_FILE,
    RESULTS_FILE,
    dense_parser,
    described,
    load_backbone,
    loss_curve,
    run_to_exit_code,
    train_with_progress,
    training_identity,
)

SHOWN = ("rmse", "abs_rel", "log10", "silog", "delta1", "delta2", "delta3")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    names = ", ".join(field.name for field in dataclasses.fields(DepthSettings))
    parser = dense_parser(__doc__ or "", layouts=tuple(LAYOUTS), settings=names, output="depth")
    add = parser.add_argument
    add("--units-per-metre", type=float, default=0.0, metavar="X", help="of the depth images (default: the layout's)")
    add("--max-depth", type=float, default=0.0, metavar="METRES", help="farthest depth (default: the layout's)")
    add("--crop", choices=tuple(CROPS), default="", help="part of the images that is measured (default: the layout's)")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> tuple[DepthSet, DepthSet]:
    """Return images to train on and images to measure on."""
    train, val = (
        make_depth_set(
            args.layout,
            args.data,
            split,
            units_per_metre=args.units_per_metre,
            max_depth=args.max_depth,
            crop=args.crop,
        )
        for split in SPLITS
    )
    return train, val


def train_head(
    args: argparse.Namespace, model: DepthModel, train: DepthSet, settings: DepthSettings, identity: dict[str, Any]
) -> list[float]:
    """Train, or go on with a training, and return the losses."""

    def losses_of(batch: DepthSample) -> Losses:
        images, depth, known = (values.to(args.device) for values in batch)
        return model.losses(images, depth, known, settings)

    return train_with_progress(
        model,
        model.features.backbone,
        losses_of,
        TrainingSamples(DepthAugmentation(settings, train), len(train), settings.seed),
        settings,
        args=args,
        identity=identity,
    )


def save_picture(args: argparse.Namespace, model: DepthModel, val: DepthSet, settings: DepthSettings) -> None:
    """Write photographs with their true and predicted depth."""
    chosen = [val.load(index) for index in chosen_images(len(val), args.pictures)]
    found = [model.predict(image, settings).cpu() for image, _ in chosen]
    figure = depth_figure([image for image, _ in chosen], [truth for _, truth in chosen], found)
    (args.output / PICTURE_FILE).write_bytes(figure_png(figure))


def run(args: argparse.Namespace) -> str:
    """Train, measure and write everything; return the table as text."""
    settings = read_settings(DepthSettings, args.config, args.set)
    settings.check()
    train, val = load_data(args)
    backbone = load_backbone(args, settings.seed)
    names = [train.name(index) for index in range(len(train))]
    data = {"units_per_metre": train.units_per_metre, "max_depth": train.max_depth}
    identity = training_identity(args, backbone, dataclasses.asdict(settings) | data, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DepthModel(backbone, settings, train.min_depth, train.max_depth).to(args.device)
    history = train_head(args, model, train, settings, identity)
    with training_progress(len(val)) as progress:
        found = evaluate_depth(model, val, settings, on_image=lambda: progress.update(progress.steps_done + 1))
    constant = constant_depth_metrics(train, val)
    shown = described(args) | {"num_train_images": len(train), "recipe": dataclasses.asdict(settings)} | data
    write_results(
        args.output / RESULTS_FILE,
        {backbone.name: found | {"mean_depth_baseline": constant, "train_loss": loss_curve(history)}},
        task="depth",
        seed=settings.seed,
        settings=shown,
    )
    save_picture(args, model, val, settings)
    lines = [f"{'':24}" + "".join(f"{name:>9}" for name in SHOWN)]
    lines += [
        f"{name[:23]:24}" + "".join(f"{numbers[key]:9.3f}" for key in SHOWN)
        for name, numbers in ((backbone.name, found), ("mean training depth", constant))
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_to_exit_code(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
