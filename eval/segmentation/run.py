r"""How well the class of every pixel can be read from a backbone: train a linear head on class maps, and measure it.

    python eval/segmentation/run.py --weights runs/mine --data CAMVID --layout camvid \
        --config eval/segmentation/configs/camvid.yaml
    python eval/segmentation/run.py --weights hub:dinov2_vits14 --data ADE --layout ade20k --set head=multiscale
    python eval/segmentation/run.py --weights random:vit_small/14 --data FOLDER --set steps=500 resize=224 crop=224

FOLDER holds images/ and annotations/ with PNGs of class numbers, 255 for none. With `--framework mmseg` (needs
eval/segmentation/requirements.txt) mmsegmentation trains and predicts; its heads are linear, multiscale, upernet and
mask2former.
Writes `results.json`, `predictions.png` and checkpoints; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from matplotlib.figure import Figure
from torch import nn

from dinov2_equi.data.datasets.base import spread_indices
from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.data.datasets.segmentation_sets import LAYOUTS, SegmentationSet, make_segmentation_set
from dinov2_equi.evaluation.dense.pictures import segmentation_figure
from dinov2_equi.evaluation.dense.segmentation import (
    SegmentationAugmentation,
    SegmentationModel,
    SegmentationSample,
    SegmentationSettings,
    evaluate_segmentation,
)
from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.run.dense_task import AnyTask, DenseTask, TaskRun, run_dense_task
from eval.segmentation.mmseg_settings import MASK2FORMER, MmsegSettings

TORCH, MMSEG = "torch", "mmseg"

SegmentationRun = TaskRun[SegmentationSettings, SegmentationSet, SegmentationModel]


class SegmentationTask(DenseTask[SegmentationSettings, SegmentationSet, SegmentationModel]):
    """The class of every pixel."""

    name = "segmentation"
    settings = SegmentationSettings
    layouts = tuple(LAYOUTS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the framework, and what can be said of the label images."""
        add = parser.add_argument
        add_framework(parser)
        add("--num-classes", type=int, default=0, metavar="N", help="of a folder without classes.txt (default: found)")
        add("--ignore", type=int, nargs="*", default=[], metavar="VALUE", help="no class in a folder, beside 255")

    def load_data(self, args: argparse.Namespace) -> tuple[SegmentationSet, SegmentationSet]:
        """Return images to train on and images to measure on."""
        train, val = (
            make_segmentation_set(args.layout, args.data, split, num_classes=args.num_classes, ignored=args.ignore)
            for split in SPLITS
        )
        return train, val

    def facts(self, train: SegmentationSet) -> dict[str, Any]:
        """Return the number of classes and what is none."""
        return {"num_classes": len(train.classes), "ignored": train.ignored}

    def build(self, backbone: EvalModel, settings: SegmentationSettings, train: SegmentationSet) -> SegmentationModel:
        """Return the backbone with a linear head."""
        return SegmentationModel(backbone, settings, len(train.classes))

    def backbone_of(self, model: SegmentationModel) -> nn.Module:
        """Return the backbone."""
        return model.features.backbone

    def augmentation(self, settings: SegmentationSettings, train: SegmentationSet) -> SegmentationAugmentation:
        """Return what makes the training crops."""
        return SegmentationAugmentation(settings, train)

    def losses(
        self, model: SegmentationModel, batch: SegmentationSample, settings: SegmentationSettings, device: str
    ) -> Losses:
        """Return the cross-entropy."""
        images, labels = (values.to(device) for values in batch)
        return {"loss": model.loss(images, labels)}

    def evaluate(self, run: SegmentationRun, on_image: Callable[[], None]) -> dict[str, Any]:
        """Return the measures over all pixels."""
        return evaluate_segmentation(run.model, run.val, run.settings, on_image=on_image)

    def figure(self, run: SegmentationRun) -> Figure:
        """Return photographs with their true and predicted classes."""
        chosen = [run.val.load(index) for index in spread_indices(len(run.val), run.args.pictures)]
        images, truths = [image for image, _ in chosen], [labels for _, labels in chosen]
        found = [run.model.predict(image, run.settings) for image in images]
        return segmentation_figure(images, truths, found, run.val.classes)

    def table(self, name: str, found: Mapping[str, Any]) -> str:
        """Return the measures beside those of the most frequent class."""
        baseline = found["majority_baseline"]
        return (
            f"{name}: mIoU {100 * found['miou']:.2f} %, pixels {100 * found['pixel_accuracy']:.2f} %, mean over "
            f"classes {100 * found['mean_accuracy']:.2f} %\nthe most frequent class everywhere: mIoU "
            f"{100 * baseline['miou']:.2f} %, pixels {100 * baseline['pixel_accuracy']:.2f} %"
        )


class MmsegTask(SegmentationTask):
    """The class of every pixel, by mmsegmentation."""

    settings = MmsegSettings

    def check(self, args: argparse.Namespace) -> None:
        """Refuse to begin without mmsegmentation, or mmdet for Mask2Former.

        Raises:
            ImportError: says how to install it.
        """
        try:
            from eval.segmentation import mmseg_run  # noqa: F401

            if read_settings(self.settings, args.config, args.set).head == MASK2FORMER:
                importlib.import_module("mmdet.models")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"--framework mmseg: {error}; install it by pip install -r eval/segmentation/requirements.txt, or take "
                "--framework torch"
            ) from error


TASKS: dict[str, SegmentationTask] = {TORCH: SegmentationTask(), MMSEG: MmsegTask()}


def add_framework(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names what trains and predicts."""
    text = f"what trains and predicts (default: {TORCH}); each lists its settings with --help"
    parser.add_argument("--framework", choices=tuple(TASKS), default=TORCH, help=text)


def train_and_measure_by_mmseg(task: AnyTask, args: argparse.Namespace) -> str:
    """Do what `train_and_measure` does by mmsegmentation, which is imported for nothing else."""
    task.check(args)
    from eval.segmentation.mmseg_run import run_mmseg

    return run_mmseg(task, args)


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_framework(first)
    try:
        framework = first.parse_known_args(argv)[0].framework
    except argparse.ArgumentError:
        framework = TORCH  # whose parser says what is wrong
    command = train_and_measure_by_mmseg if framework == MMSEG else None
    return run_dense_task(TASKS[framework], __doc__, Path(__file__), argv, command)


if __name__ == "__main__":
    sys.exit(main())
