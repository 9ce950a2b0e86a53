r"""How well objects are found with a backbone: train one of torchvision's detectors on it, and measure its precision.

    pip install -r eval/detection/requirements.txt
    python eval/detection/run.py --weights runs/mine --data FOLDER --config eval/detection/configs/small.yaml
    python eval/detection/run.py --weights hub:dinov2_vits14 --data COCO --set finetune=true layer_decay=0.8
    python eval/detection/run.py --weights runs/mine --train train.json images/ --val val.json images/ \
        --set detector=retinanet steps=1000

FOLDER holds annotations/instances_train.json with train/, and the same for val, as COCO does.
Writes `results.json`, `predictions.png`, `curve.png` (AP50 against steps; `--set curve_every=N` measures on the way)
and checkpoints; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from matplotlib.figure import Figure
from torch import nn

from dinov2_equi.data.datasets.base import DatasetError, spread_indices
from dinov2_equi.data.datasets.coco import DetectionSet, coco_files, read_coco
from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.distributed.collectives import largest_of_ranks
from dinov2_equi.distributed.env import is_main_process
from dinov2_equi.evaluation.dense.detection import (
    DetectionAugmentation,
    DetectionModel,
    DetectionSettings,
    Sample,
    as_list,
    evaluate_detection,
)
from dinov2_equi.evaluation.dense.detection_metrics import AUTO, COCO_LIBRARIES, MASK_THRESHOLD, coco_library
from dinov2_equi.evaluation.dense.measured import MeasuredCurve, measured_figure
from dinov2_equi.evaluation.dense.pictures import boxes_figure
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.run.dense_task import DenseTask, TaskRun, run_dense_task

CURVE_FILE, CURVE_PICTURE = "curve.json", "curve.png"
SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")

DetectionRun = TaskRun[DetectionSettings, DetectionSet, DetectionModel]


class DetectionTask(DenseTask[DetectionSettings, DetectionSet, DetectionModel]):
    """Boxes and masks of objects."""

    name = "detection"
    settings = DetectionSettings
    layouts = ("coco",)
    needs_data = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add files that lie elsewhere, and what the picture shows."""
        add = parser.add_argument
        add("--train", type=Path, nargs=2, metavar=("JSON", "IMAGES"), help="file and folder to train on, for --data")
        add("--val", type=Path, nargs=2, metavar=("JSON", "IMAGES"), help="file and folder that are measured")
        add("--shown-score", type=float, default=0.5, metavar="S", help="least score in the picture (default: 0.5)")
        add("--coco-eval", choices=(AUTO, *COCO_LIBRARIES), default=AUTO, help="what measures (default: the faster)")

    def check(self, args: argparse.Namespace) -> None:
        """Ask for what measures the precision."""
        coco_library(args.coco_eval)

    def memory_advice(self, settings: DetectionSettings) -> str:
        """Return which settings to lower where memory runs out."""
        changes = [f"lower batch_size (now {settings.batch_size})"] if settings.batch_size > 1 else []
        changes += [f"lower size (now {settings.size})"]
        changes += [] if settings.window else ["attend in windows (window=14)"]
        changes += ["leave the backbone frozen (finetune=false)"] if settings.finetune else []
        changes += [f"lower regions (now {settings.regions})"] if settings.has_regions else []
        return f"{', or '.join(changes)}, by --set"

    def load_data(self, args: argparse.Namespace) -> tuple[DetectionSet, DetectionSet]:
        """Return images to train on and images to measure on.

        Raises:
            DatasetError: it is not said which, or the classes of the two differ.
        """
        if bool(args.data) == bool(args.train or args.val) or bool(args.train) != bool(args.val):
            raise DatasetError("give --data FOLDER alone, or both --train JSON IMAGES and --val JSON IMAGES")
        files = [coco_files(args.data.expanduser(), split) for split in SPLITS] if args.data else [args.train, args.val]
        train, val = (read_coco(path.expanduser(), folder.expanduser()) for path, folder in files)
        if train.classes != val.classes or train.category_ids != val.category_ids:
            raise DatasetError(
                f"the categories of {train.path} and {val.path} differ: {train.classes[:5]}, {val.classes[:5]}"
            )
        return train, val

    def facts(self, train: DetectionSet) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"classes": train.classes}

    def build(self, backbone: EvalModel, settings: DetectionSettings, train: DetectionSet) -> DetectionModel:
        """Return a detector on the backbone."""
        return DetectionModel(backbone, settings, len(train.classes))

    def backbone_of(self, model: DetectionModel) -> nn.Module:
        """Return the backbone below pyramid and detector."""
        return model.backbone

    def augmentation(self, settings: DetectionSettings, train: DetectionSet) -> DetectionAugmentation:
        """Return what makes the training crops."""
        return DetectionAugmentation(settings, train)

    def collate(self) -> Callable[[list[Sample]], list[Sample]]:
        """Return what leaves samples as they are: the numbers of objects differ."""
        return as_list

    def losses(self, model: DetectionModel, batch: list[Sample], settings: DetectionSettings, device: str) -> Losses:
        """Return the terms of the detector's loss."""
        return model.losses(batch, device)

    def after_step(self, run: DetectionRun, step: int) -> None:
        """Measure on the way, where the settings ask for it and it was not done before a stop."""
        if run.settings.curve_every == 0 or step % run.settings.curve_every:
            return
        curve = curve_of(run)
        if largest_of_ranks(int(not curve.has(step)), run.args.device):
            found = self.evaluate(run, lambda: None)
            if is_main_process():
                curve.add(step, curve_numbers(found))

    def evaluate(self, run: DetectionRun, on_image: Callable[[], None]) -> dict[str, Any]:
        """Return the average precision of boxes and masks."""
        library = coco_library(run.args.coco_eval)
        found = evaluate_detection(run.model, run.val, run.settings, on_image=on_image, library=library)
        return found | {"coco_eval": library}

    def about_training(self, run: DetectionRun, found: Mapping[str, Any], losses: Mapping[str, Any]) -> dict[str, Any]:
        """Return the precision against steps, and draw it."""
        columns = curve_of(run).columns(last=curve_numbers(found))
        figure = measured_figure(columns, losses, title=f"{run.name}, {run.settings.detector}")
        write_figure(run.args.output / CURVE_PICTURE, figure)
        return {"curve": columns}

    def figure(self, run: DetectionRun) -> Figure:
        """Return photographs with true and found boxes."""
        args, model, val, settings = run.args, run.model, run.val, run.settings
        chosen = spread_indices(len(val), args.pictures)
        images = [val.load_image(index) for index in chosen]
        truths = [val.objects(index, with_masks=False) for index in chosen]
        outputs = [model.predict(image) for image in images]
        kept = [{name: v[found["scores"] >= args.shown_score] for name, v in found.items()} for found in outputs]
        return boxes_figure(
            images,
            [(objects.boxes, objects.labels - 1) for objects in truths],
            [(found["boxes"], found["labels"] - 1) for found in kept],
            val.classes,
            [found["masks"][:, 0] >= MASK_THRESHOLD for found in kept] if settings.has_masks else None,
        )

    def table(self, name: str, found: Mapping[str, Any]) -> str:
        """Return the average precision of boxes and masks."""
        lines = [f"{'':24}" + "".join(f"{column:>10}" for column in SHOWN)]
        for kind in ("box", "mask"):
            if kind in found:
                lines.append(f"{name[:18] + ' ' + kind:24}" + "".join(f"{found[kind][n]:10.3f}" for n in SHOWN))
        return "\n".join(lines)


def curve_of(run: DetectionRun) -> MeasuredCurve:
    """Return what was measured on the way."""
    names = "\0".join(run.val.name(index) for index in range(len(run.val)))
    depends_on = {**run.identity, "measured images": hashlib.sha256(names.encode()).hexdigest()}
    return MeasuredCurve(run.args.output / CURVE_FILE, run.settings.steps, depends_on)


def curve_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a measurement is drawn against the steps."""
    return {f"{kind} {name}": found[kind][name] for kind in ("box", "mask") if kind in found for name in ("AP50", "AP")}


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_dense_task(DetectionTask(), __doc__, Path(__file__), argv)


if __name__ == "__main__":
    sys.exit(main())
