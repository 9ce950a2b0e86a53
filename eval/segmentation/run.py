r"""How well the class of every pixel can be read from a backbone: train a linear head on class maps, and measure it.

    python eval/segmentation/run.py --weights runs/mine --data CAMVID --layout camvid \
        --config eval/segmentation/configs/camvid.yaml
    python eval/segmentation/run.py --weights hub:dinov2_vits14 --data ADE --layout ade20k --set head=multiscale
    python eval/segmentation/run.py --weights random:vit_small/14 --data FOLDER --set steps=500 resize=224 crop=224

FOLDER holds images/ and annotations/ with PNGs of class numbers, 255 for none. With `--framework mmseg` (needs
eval/segmentation/requirements.txt) mmsegmentation trains and predicts; its heads are linear, multiscale and upernet.
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
    TrainedSegmentation,
    evaluate_segmentation,
)
from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.dense.training import Losses, TrainingSamples
from dinov2_equi.evaluation.eval_model import EvalModel
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
from eval.segmentation.mmseg_settings import MmsegSettings

TORCH, MMSEG = "torch", "mmseg"
SETTINGS: dict[str, type[SegmentationSettings]] = {TORCH: SegmentationSettings, MMSEG: MmsegSettings}
"""The settings of each framework."""

Split = tuple[SegmentationSet, SegmentationSet]
"""Images to train on and images to measure on."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    names, more = ([field.name for field in dataclasses.fields(kind)] for kind in SETTINGS.values())
    known = f"{', '.join(names)}; with mmseg also {', '.join(name for name in more if name not in names)}"
    parser = dense_parser(__doc__ or "", layouts=tuple(LAYOUTS), settings=known, output="segmentation")
    add = parser.add_argument
    add("--framework", choices=tuple(SETTINGS), default=TORCH, help="what trains and predicts (default: torch)")
    add("--num-classes", type=int, default=0, metavar="N", help="of a folder without classes.txt (default: found out)")
    add("--ignore", type=int, nargs="*", default=[], metavar="VALUE", help="no class in a folder, beside 255")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> Split:
    """Return images to train on and images to measure on."""
    train, val = (
        make_segmentation_set(args.layout, args.data, split, num_classes=args.num_classes, ignored=args.ignore)
        for split in SPLITS
    )
    return train, val


def run_torch(
    args: argparse.Namespace,
    settings: SegmentationSettings,
    backbone: EvalModel,
    data: Split,
    identity: dict[str, Any],
) -> TrainedSegmentation:
    """Train a linear head, or go on with a training, and measure it."""
    train, val = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SegmentationModel(backbone, settings, len(train.classes)).to(args.device)

    def losses_of(batch: SegmentationSample) -> Losses:
        images, labels = (values.to(args.device) for values in batch)
        return {"loss": model.loss(images, labels)}

    losses = train_with_progress(
        model,
        model.features.backbone,
        losses_of,
        TrainingSamples(SegmentationAugmentation(settings, train), len(train), settings.seed),
        settings,
        args=args,
        identity=identity,
    )
    with training_progress(len(val)) as progress:
        found = evaluate_segmentation(model, val, settings, on_image=lambda: progress.update(progress.steps_done + 1))
    return TrainedSegmentation(backbone.name, losses, found, lambda image: model.predict(image, settings))


def train_and_measure(
    args: argparse.Namespace,
    settings: SegmentationSettings,
    backbone: EvalModel,
    data: Split,
    identity: dict[str, Any],
) -> TrainedSegmentation:
    """Return what the framework that the command line names makes of it.

    Raises:
        ImportError: its packages are missing; says how to install them.
    """
    if not isinstance(settings, MmsegSettings):
        return run_torch(args, settings, backbone, data, identity)
    try:
        from eval.segmentation.mmseg_run import run_mmseg
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--framework mmseg: {error}; install it by pip install -r eval/segmentation/requirements.txt, or take "
            "--framework torch"
        ) from error
    return run_mmseg(args, settings, backbone, data, identity)


def save_picture(args: argparse.Namespace, trained: TrainedSegmentation, val: SegmentationSet) -> None:
    """Write photographs with their true and predicted classes."""
    chosen = [val.load(index) for index in chosen_images(len(val), args.pictures)]
    images, truths = [image for image, _ in chosen], [labels for _, labels in chosen]
    figure = segmentation_figure(images, truths, [trained.predict(image) for image in images], val.classes)
    (args.output / PICTURE_FILE).write_bytes(figure_png(figure))


def run(args: argparse.Namespace) -> str:
    """Train, measure and write everything; return the measures as text."""
    settings = read_settings(SETTINGS[args.framework], args.config, args.set)
    settings.check()
    train, val = load_data(args)
    backbone = load_backbone(args, settings.seed)
    names = [train.name(index) for index in range(len(train))]
    classes = {"num_classes": len(train.classes), "ignored": train.ignored}
    identity = training_identity(args, backbone, dataclasses.asdict(settings) | classes, names)
    trained = train_and_measure(args, settings, backbone, (train, val), identity)
    found = trained.measures
    write_results(
        args.output / RESULTS_FILE,
        {trained.name: found | {"train_loss": loss_curve(trained.losses)}},
        task="segmentation",
        seed=settings.seed,
        settings=described(args) | {"num_train_images": len(train), "recipe": dataclasses.asdict(settings)} | classes,
    )
    save_picture(args, trained, val)
    baseline = found["majority_baseline"]
    return (
        f"{trained.name}: mIoU {100 * found['miou']:.2f} %, pixels {100 * found['pixel_accuracy']:.2f} %, mean over "
        f"classes {100 * found['mean_accuracy']:.2f} %\nthe most frequent class everywhere: mIoU "
        f"{100 * baseline['miou']:.2f} %, pixels {100 * baseline['pixel_accuracy']:.2f} %"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_to_exit_code(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
