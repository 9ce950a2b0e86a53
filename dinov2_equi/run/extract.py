"""Features of images in a file, for people who want nothing else.

    python dinov2_equi/run/extract.py photos --weights runs/mine --out features.parquet
    python dinov2_equi/run/extract.py photos --weights hub:dinov2_vits14 --features patch_mean --size 518 --out f.npy

photos is a folder, or any data set of the training configuration. `.parquet` holds a row an image, `name` and
`features`; `.pt` a dictionary of `names` and `features`; `.npy` the features alone, with the names beside it in `.txt`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.evaluation.eval_model import HALF_FEATURES, PLAIN_FEATURES, EvalModel, select_features, shared_channels
from dinov2_equi.evaluation.labelled import image_batches
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import FORMS_OF_ONE, load_eval_model

SUFFIXES = (".parquet", ".npy", ".pt")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "data", metavar="FOLDER", help="images at any depth, or a data set such as ImageNet:split=VAL:root=DIR"
    )
    parser.add_argument("--weights", required=True, metavar="WEIGHTS", help=f"one of: {FORMS_OF_ONE}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"ends in {', '.join(SUFFIXES)}")
    names = PLAIN_FEATURES + HALF_FEATURES
    parser.add_argument(
        "--features",
        choices=names,
        default="cls",
        help="class token (default), mean patch token, or both one after the other; the parts of a run with a split",
    )
    parser.add_argument("--size", type=int, help="image side, pixels (default: the one the backbone was trained at)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in one forward pass (default: 64)")
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that decode images (default: 0, in this one)"
    )
    add_device(parser)
    return parser.parse_args(argv)


def extract(args: argparse.Namespace, model: EvalModel, dataset: ImageDataset) -> Tensor:
    """Return the features of all images, [n, F] float32.

    Raises:
        ValueError: for a size that is no whole number of patches, or features that the backbone does not have.
    """
    size = args.size or model.image_size
    model.check_size(size)
    if args.features not in model.feature_names:
        raise ValueError(f"{model.name} has no features {args.features!r}; it has {', '.join(model.feature_names)}")
    loader = image_batches(dataset, EvalTransform(size), batch_size=args.batch_size, num_workers=args.num_workers)
    with training_progress(math.ceil(len(dataset) / args.batch_size)) as progress:
        pooled = model.to(args.device).features(
            loader,
            device=args.device,
            batch_size=args.batch_size,
            on_batch=lambda: progress.update(progress.steps_done + 1),
        )
    return select_features(pooled, args.features)


def write(path: Path, names: list[str], features: Tensor) -> None:
    """Write features [n, F] with the names of their images, under a temporary name first.

    Raises:
        ImportError: if `.parquet` is wanted and pyarrow is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".pt":
            torch.save({"names": names, "features": features}, pending)
        elif path.suffix == ".npy":
            with pending.open("wb") as file:
                np.save(file, features.numpy())
            path.with_suffix(".txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        else:
            _write_parquet(pending, names, features)
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)


def _write_parquet(path: Path, names: list[str], features: Tensor) -> None:
    arrow: Any = _pyarrow()
    values = arrow.FixedSizeListArray.from_arrays(arrow.array(features.flatten().numpy()), features.shape[1])
    importlib.import_module("pyarrow.parquet").write_table(arrow.table({"name": names, "features": values}), path)


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(f"a .parquet file needs the package pyarrow: pip install pyarrow ({error})") from error


def command(args: argparse.Namespace) -> int:
    """Compute the features and write them."""
    if args.out.suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {args.out}")
    if args.out.suffix == ".parquet":
        _pyarrow()  # before the images are read
    model = load_eval_model(args.weights, size=args.size)
    dataset = make_dataset(args.data, shared_channels([model]))
    features = extract(args, model, dataset)
    write(args.out, [dataset.name(index) for index in range(len(dataset))], features)
    print(f"{len(features)} images, {features.shape[1]} features each: {args.out}")
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
