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
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.coco import DetectionSet, coco_files, read_coco
from dinov2_equi.data.datasets.pairs import SPLITS
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
from dinov2_equi.evaluation.dense.pictures import boxes_figure, chosen_images
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
    explained_memory,
    load_backbone,
    loss_curve,
    run_to_exit_code,
    train_with_progress,
    training_identity,
)

CURVE_FILE, CURVE_PICTURE = "curve.json", "curve.png"
SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    names = ", ".join(field.name for field in dataclasses.fields(DetectionSettings))
    parser = dense_parser(__doc__ or "", layouts=("coco",), settings=names, output="detection", needs_data=False)
    add = parser.add_argument
    add("--train", type=Path, nargs=2, metavar=("JSON", "IMAGES"), help="file and folder to train on, for --data")
    add("--val", type=Path, nargs=2, metavar=("JSON", "IMAGES"), help="file and folder that are measured")
    add("--shown-score", type=float, default=0.5, metavar="S", help="least score in predictions.png (default: 0.5)")
    add("--coco-eval", choices=(AUTO, *COCO_LIBRARIES), default=AUTO, help="what measures (default: the faster one)")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> tuple[DetectionSet, DetectionSet]:
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


def train_head(
    args: argparse.Namespace,
    model: DetectionModel,
    train: DetectionSet,
    settings: DetectionSettings,
    identity: dict[str, Any],
    *,
    measure: Callable[[int], None],
) -> list[float]:
    """Train, or go on with a training, and return the losses; `measure` is called after each step."""

    def losses_of(batch: list[Sample]) -> Losses:
        return model.losses(batch, args.device)

    return train_with_progress(
        model,
        model.backbone,
        losses_of,
        TrainingSamples(DetectionAugmentation(settings, train), len(train), settings.seed),
        settings,
        args=args,
        identity=identity,
        collate=as_list,
        on_step=measure,
    )


def memory_advice(settings: DetectionSettings) -> str:
    """Return which settings to lower where memory runs out."""
    changes = [f"lower batch_size (now {settings.batch_size})"] if settings.batch_size > 1 else []
    changes += [f"lower size (now {settings.size})"]
    changes += [] if settings.window else ["attend in windows (window=14)"]
    changes += ["leave the backbone frozen (finetune=false)"] if settings.finetune else []
    changes += [f"lower regions (now {settings.regions})"] if settings.has_regions else []
    return f"{', or '.join(changes)}, by --set"


def curve_numbers(found: dict[str, Any]) -> dict[str, float]:
    """Return what of a measurement is drawn against the steps."""
    return {f"{kind} {name}": found[kind][name] for kind in ("box", "mask") if kind in found for name in ("AP50", "AP")}


def save_picture(
    args: argparse.Namespace, model: DetectionModel, val: DetectionSet, settings: DetectionSettings
) -> None:
    """Write photographs with true and found boxes."""
    chosen = chosen_images(len(val), args.pictures)
    images = [val.load_image(index) for index in chosen]
    truths = [val.objects(index, with_masks=False) for index in chosen]
    outputs = [model.predict(image) for image in images]
    kept = [{name: values[found["scores"] >= args.shown_score] for name, values in found.items()} for found in outputs]
    figure = boxes_figure(
        images,
        [(objects.boxes, objects.labels - 1) for objects in truths],
        [(found["boxes"], found["labels"] - 1) for found in kept],
        val.classes,
        [found["masks"][:, 0] >= MASK_THRESHOLD for found in kept] if settings.has_masks else None,
    )
    (args.output / PICTURE_FILE).write_bytes(figure_png(figure))


def run(args: argparse.Namespace) -> str:
    """Train, measure and write everything; return the measures as text."""
    settings = read_settings(DetectionSettings, args.config, args.set)
    settings.check()
    library = coco_library(args.coco_eval)  # asked for before an hour of training, not after it
    train, val = load_data(args)
    backbone = load_backbone(args, settings.seed)
    names = [train.name(index) for index in range(len(train))]
    identity = training_identity(args, backbone, dataclasses.asdict(settings) | {"classes": train.classes}, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DetectionModel(backbone, settings, len(train.classes)).to(args.device)
    curve = MeasuredCurve(args.output / CURVE_FILE, settings.curve_every, settings.steps, identity)

    def measure(step: int) -> None:
        if curve.is_due(step):
            curve.add(step, curve_numbers(evaluate_detection(model, val, settings, library=library)))

    with explained_memory(memory_advice(settings)):
        history = train_head(args, model, train, settings, identity, measure=measure)
        with training_progress(len(val)) as progress:
            found = evaluate_detection(
                model, val, settings, on_image=lambda: progress.update(progress.steps_done + 1), library=library
            )
    curves = {"curve": curve.columns(last=curve_numbers(found)), "train_loss": loss_curve(history)}
    write_results(
        args.output / RESULTS_FILE,
        {backbone.name: found | curves},
        task="detection",
        seed=settings.seed,
        settings=described(args)
        | {"num_train_images": len(train), "recipe": dataclasses.asdict(settings), "coco_eval": library},
    )
    save_picture(args, model, val, settings)
    figure = measured_figure(curves["curve"], curves["train_loss"], title=f"{backbone.name}, {settings.detector}")
    (args.output / CURVE_PICTURE).write_bytes(figure_png(figure))
    lines = [f"{'':24}" + "".join(f"{name:>10}" for name in SHOWN)]
    for kind in ("box", "mask"):
        if kind in found:
            lines.append(f"{backbone.name[:18] + ' ' + kind:24}" + "".join(f"{found[kind][n]:10.3f}" for n in SHOWN))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit code 2."""
    return run_to_exit_code(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
