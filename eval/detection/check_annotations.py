r"""Holds files in COCO's format against themselves: what is true, taken for found, has an average precision of 1.

    python eval/detection/check_annotations.py --data COCO BCCD
    python eval/detection/check_annotations.py --file train.json images/ --output check.json

FOLDER holds annotations/instances_train.json with train/, and the same for val, as COCO does; one of the two is enough.
Every library that is installed measures (pycocotools, faster-coco-eval). Writes a results file with the numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.coco import DetectionSet, coco_files, read_coco
from dinov2_equi.data.datasets.pairs import SPLITS
from dinov2_equi.evaluation.dense.detection_metrics import (
    BOX,
    COCO_LIBRARIES,
    MASK,
    average_precision,
    coco_library,
    perfect_detections,
)
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.run.command import EXIT_DONE, EXIT_FAILED, command_parser, run_command

LEAST = 1 - 1e-9
"""Of an average precision of 1: the mean of 101 x 10 x classes ones, each with an error of rounding."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="*", default=[], metavar="FOLDER", help="data sets as COCO lies")
    add("--file", type=Path, nargs=2, action="append", default=[], metavar=("JSON", "IMAGES"), help="one file alone")
    add("--output", type=Path, default=Path("check_annotations.json"), help="default: check_annotations.json")
    return parser.parse_args(argv)


def files_of(folder: Path) -> list[tuple[Path, Path]]:
    """Return the JSON files of a data set with their folders of images.

    Raises:
        DatasetError: there is none.
    """
    found = []
    for split in SPLITS:
        try:
            found.append(coco_files(folder, split))
        except DatasetError:
            if split == SPLITS[-1] and not found:
                raise
    return found


def installed() -> list[str]:
    """Return the names of the libraries that are installed, at least pycocotools.

    Raises:
        ImportError: not even that.
    """
    coco_library(COCO_LIBRARIES[0])
    found = []
    for name in COCO_LIBRARIES:
        try:
            found.append(coco_library(name))
        except ImportError:
            continue
    return found


def check(dataset: DetectionSet, libraries: list[str]) -> dict[str, Any]:
    """Return what a file holds, and the average precision of its own objects by each library."""
    objects = [annotation for found in dataset.annotations.values() for annotation in found]
    numbers: dict[str, Any] = {
        "images": len(dataset),
        "objects": len(objects),
        "crowds": sum(bool(annotation.get("iscrowd")) for annotation in objects),
        "has_masks": dataset.has_masks,
    }
    for name, kind in (("box", BOX), ("mask", MASK)):
        if kind == MASK and not dataset.has_masks:
            continue
        detections = perfect_detections(dataset, kind)
        numbers[name] = {"detections": len(detections)}
        for library in libraries:
            measured = average_precision(dataset, detections, kind, library)
            numbers[name][library] = {key: value for key, value in measured.items() if key != "by_class"}
    return numbers


def precisions(numbers: dict[str, Any]) -> list[float]:
    """Return every average precision over all sizes in what `check` returns."""
    kinds = [numbers[name] for name in ("box", "mask") if name in numbers]
    return [found["AP"] for kind in kinds for found in kind.values() if isinstance(found, dict)]


def run(args: argparse.Namespace) -> int:
    """Check all files, print a line for each and write the numbers; the exit code says whether all are 1.

    Where there is nothing to find the precision is NaN, and nothing is wrong.
    """
    files = [(path.expanduser(), folder.expanduser()) for path, folder in args.file]
    files = list(dict.fromkeys(files + [pair for folder in args.data for pair in files_of(folder.expanduser())]))
    if not files:
        raise DatasetError("give --data FOLDER ... or --file JSON IMAGES")
    libraries = installed()
    numbers = {}
    for path, folder in files:
        name = str(path)
        if name in numbers:
            raise DatasetError(f"{path} is given with two folders of images: check one after the other")
        numbers[name] = found = check(read_coco(path, folder), libraries)
        shown = ", ".join(
            f"{kind} AP {found[kind][libraries[0]]['AP']:.12f}" for kind in ("box", "mask") if kind in found
        )
        print(f"{name}: {found['images']} images, {found['objects']} objects ({found['crowds']} crowds); {shown}")
    write_results(args.output, numbers, task="check_annotations", settings={"libraries": libraries})
    print(f"written: {args.output}")
    values = [value for found in numbers.values() for value in precisions(found)]
    return EXIT_DONE if all(math.isnan(value) or value >= LEAST for value in values) else EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    """Run the check; a fault of the input ends in one line on stderr and exit code 2."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
