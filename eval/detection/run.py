r"""How well objects are found with a backbone: train one of torchvision's detectors on it, and measure its precision.

    pip install -r eval/detection/requirements.txt
    python eval/detection/run.py --weights runs/mine --data FOLDER --config eval/detection/configs/small.yaml
    python eval/detection/run.py --weights hub:dinov2_vits14 --data COCO --set finetune=true layer_decay=0.8
    python eval/detection/run.py --weights runs/mine --train train.json images/ --val val.json images/ \
        --set detector=retinanet steps=1000

FOLDER holds annotations/instances_train.json with train/, and the same for val, as COCO does.
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

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.coco import DetectionSet, coco_files, import_coco, read_coco
from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.evaluation.dense.detection import (
    DetectionAugmentation,
    DetectionModel,
    DetectionSettings,
    Sample,
    as_list,
    evaluate_detection,
)
from dinov2_equi.evaluation.dense.detection_metrics import MASK_THRESHOLD
from dinov2_equi.evaluation.dense.pictures import boxes_figure, chosen_images
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.run.dense_task import DenseTask, run_dense_task

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


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

    def check_libraries(self) -> None:
        """Ask for pycocotools."""
        import_coco("cocoeval")

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

    def evaluate(
        self, model: DetectionModel, val: DetectionSet, settings: DetectionSettings, on_image: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the average precision of boxes and masks."""
        return evaluate_detection(model, val, settings, on_image=on_image)

    def figure(
        self, args: argparse.Namespace, model: DetectionModel, val: DetectionSet, settings: DetectionSettings
    ) -> Figure:
        """Return photographs with true and found boxes."""
        chosen = chosen_images(len(val), args.pictures)
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


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_dense_task(DetectionTask(), __doc__, Path(__file__), argv)


if __name__ == "__main__":
    sys.exit(main())
