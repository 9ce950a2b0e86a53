"""How well depth can be read from a backbone: train a head on images with depth maps, and measure it.

    python eval/depth/run.py --weights runs/mine --data FOLDER --config eval/depth/configs/small.yaml
    python eval/depth/run.py --weights hub:dinov2_vits14 --data NYU --layout nyu --set head=linear4
    python eval/depth/run.py --weights random:vit_small/14 --data FOLDER --set head=dpt steps=500 lr=3e-4

FOLDER holds images and 16-bit depth PNGs in millimetres: images/ and depth/, or a.color.jpg beside a.depth.png.
Writes `results.json`, `predictions.png` and checkpoints; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from matplotlib.figure import Figure
from torch import nn

from dinov2_equi.data.datasets.base import spread_indices
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
from dinov2_equi.evaluation.dense.pictures import depth_figure
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.run.dense_task import DenseTask, TaskRun, run_dense_task

SHOWN = ("rmse", "abs_rel", "log10", "silog", "delta1", "delta2", "delta3")
BASELINE = "mean_depth_baseline"

DepthRun = TaskRun[DepthSettings, DepthSet, DepthModel]


class DepthTask(DenseTask[DepthSettings, DepthSet, DepthModel]):
    """Depth of every pixel."""

    name = "depth"
    settings = DepthSettings
    layouts = tuple(LAYOUTS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what can be said of the depth images."""
        add = parser.add_argument
        add("--units-per-metre", type=float, default=0.0, metavar="X", help="of depth images (default: the layout's)")
        add("--max-depth", type=float, default=0.0, metavar="METRES", help="farthest depth (default: the layout's)")
        add("--crop", choices=tuple(CROPS), default="", help="part that is measured (default: the layout's)")

    def load_data(self, args: argparse.Namespace) -> tuple[DepthSet, DepthSet]:
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

    def facts(self, train: DepthSet) -> dict[str, Any]:
        """Return the unit and the range of the depth."""
        return {"units_per_metre": train.units_per_metre, "max_depth": train.max_depth}

    def build(self, backbone: EvalModel, settings: DepthSettings, train: DepthSet) -> DepthModel:
        """Return the backbone with a head that reads depth."""
        return DepthModel(backbone, settings, train.min_depth, train.max_depth)

    def backbone_of(self, model: DepthModel) -> nn.Module:
        """Return the backbone."""
        return model.features.backbone

    def augmentation(self, settings: DepthSettings, train: DepthSet) -> DepthAugmentation:
        """Return what makes the training crops."""
        return DepthAugmentation(settings, train)

    def losses(self, model: DepthModel, batch: DepthSample, settings: DepthSettings, device: str) -> Losses:
        """Return the weighted terms of the loss."""
        images, depth, known = (values.to(device) for values in batch)
        return model.losses(images, depth, known, settings)

    def evaluate(self, run: DepthRun, on_image: Callable[[], None]) -> dict[str, Any]:
        """Return the mean measures of the images."""
        return dict(evaluate_depth(run.model, run.val, run.settings, on_image=on_image))

    def baselines(self, train: DepthSet, val: DepthSet, device: str) -> dict[str, Any]:
        """Return the measures of the mean training depth everywhere."""
        return {BASELINE: constant_depth_metrics(train, val, device)}

    def figure(self, run: DepthRun) -> Figure:
        """Return photographs with their true and predicted depth."""
        chosen = [run.val.load(index) for index in spread_indices(len(run.val), run.args.pictures)]
        found = [run.model.predict(image, run.settings).cpu() for image, _ in chosen]
        return depth_figure([image for image, _ in chosen], [truth for _, truth in chosen], found)

    def table(self, name: str, found: Mapping[str, Any]) -> str:
        """Return the measures beside those of the mean training depth."""
        lines = [f"{'':24}" + "".join(f"{name:>9}" for name in SHOWN)]
        lines += [
            f"{label[:23]:24}" + "".join(f"{numbers[key]:9.3f}" for key in SHOWN)
            for label, numbers in ((name, found), ("mean training depth", found[BASELINE]))
        ]
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_dense_task(DepthTask(), __doc__, Path(__file__), argv)


if __name__ == "__main__":
    sys.exit(main())
