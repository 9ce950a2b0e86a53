r"""How well the class of every pixel can be read from a backbone: train a linear head on class maps, and measure it.

    python eval/segmentation/run.py --weights runs/mine --data CAMVID --layout camvid \
        --config eval/segmentation/configs/camvid.yaml
    python eval/segmentation/run.py --weights hub:dinov2_vits14 --data ADE --layout ade20k --set head=multiscale
    python eval/segmentation/run.py --weights random:vit_small/14 --data FOLDER --set steps=500 resize=224 crop=224

FOLDER holds images/ and annotations/ with PNGs of class numbers, 255 for none.
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

from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.data.datasets.segmentation_sets import LAYOUTS, SegmentationSet, make_segmentation_set
from dinov2_equi.evaluation.dense.pictures import chosen_images, segmentation_figure
from dinov2_equi.evaluation.dense.segmentation import (
    SegmentationAugmentation,
    SegmentationModel,
    SegmentationSample,
    SegmentationSettings,
    evaluate_segmentation,
)
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

FRAMEWORKS = ("torch",)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    names = ", ".join(field.name for field in dataclasses.fields(SegmentationSettings))
    parser = dense_parser(__doc__ or "", layouts=tuple(LAYOUTS), settings=names, output="segmentation")
    add = parser.add_argument
    add("--framework", choices=FRAMEWORKS, default="torch", help="what trains and predicts (default: torch)")
    add("--num-classes", type=int, default=0, metavar="N", help="of a folder without classes.txt (default: found out)")
    add("--ignore", type=int, nargs="*", default=[], metavar="VALUE", help="no class in a folder, beside 255")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> tuple[SegmentationSet, SegmentationSet]:
    """Return images to train on and images to measure on."""
    train, val = (
        make_segmentation_set(args.layout, args.data, split, num_classes=args.num_classes, ignored=args.ignore)
        for split in SPLITS
    )
    return train, val


def train_head(
    args: argparse.Namespace,
    model: SegmentationModel,
    train: SegmentationSet,
    settings: SegmentationSettings,
    identity: dict[str, Any],
) -> list[float]:
    """Train, or go on with a training, and return the losses."""

    def losses_of(batch: SegmentationSample) -> Losses:
        images, labels = (values.to(args.device) for values in batch)
        return {"loss": model.loss(images, labels)}

    return train_with_progress(
        model,
        model.features.backbone,
        losses_of,
        TrainingSamples(SegmentationAugmentation(settings, train), len(train), settings.seed),
        settings,
        args=args,
        identity=identity,
    )


def save_picture(
    args: argparse.Namespace, model: SegmentationModel, val: SegmentationSet, settings: SegmentationSettings
) -> None:
    """Write photographs with their true and predicted classes."""
    chosen = [val.load(index) for index in chosen_images(len(val), args.pictures)]
    images, truths = [image for image, _ in chosen], [labels for _, labels in chosen]
    found = [model.predict(image, settings) for image in images]
    figure = segmentation_figure(images, truths, found, val.classes)
    (args.output / PICTURE_FILE).write_bytes(figure_png(figure))


def run(args: argparse.Namespace) -> str:
    """Train, measure and write everything; return the measures as text."""
    settings = read_settings(SegmentationSettings, args.config, args.set)
    settings.check()
    train, val = load_data(args)
    backbone = load_backbone(args, settings.seed)
    names = [train.name(index) for index in range(len(train))]
    data = {"num_classes": len(train.classes), "ignored": train.ignored}
    identity = training_identity(args, backbone, dataclasses.asdict(settings) | data, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SegmentationModel(backbone, settings, len(train.classes)).to(args.device)
    history = train_head(args, model, train, settings, identity)
    with training_progress(len(val)) as progress:
        found = evaluate_segmentation(model, val, settings, on_image=lambda: progress.update(progress.steps_done + 1))
    write_results(
        args.output / RESULTS_FILE,
        {backbone.name: found | {"train_loss": loss_curve(history)}},
        task="segmentation",
        seed=settings.seed,
        settings=described(args) | {"num_train_images": len(train), "recipe": dataclasses.asdict(settings)} | data,
    )
    save_picture(args, model, val, settings)
    baseline = found["majority_baseline"]
    return (
        f"{backbone.name}: mIoU {100 * found['miou']:.2f} %, pixels {100 * found['pixel_accuracy']:.2f} %, mean over "
        f"classes {100 * found['mean_accuracy']:.2f} %\nthe most frequent class everywhere: mIoU "
        f"{100 * baseline['miou']:.2f} %, pixels {100 * baseline['pixel_accuracy']:.2f} %"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_to_exit_code(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
