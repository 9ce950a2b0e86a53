"""Classify images by their nearest neighbours in feature space: no training, one number a k.

    python eval/classification/knn.py --run runs/quickstart --train DIR/train --val DIR/val
    python eval/classification/knn.py --weights teacher_backbone.safetensors --train DIR/train --val DIR/val
    python eval/classification/knn.py --weights random --arch vit_small --train DIR/train --val DIR/val
    python eval/classification/knn.py --weights pixels --train DIR/train --val DIR/val

DIR/train and DIR/val hold one sub-folder a class; `ImageNet:split=TRAIN:root=FOLDER` works as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.evaluation.eval_model import PLAIN_FEATURES, EvalModel, select_features, shared_channels
from dinov2_equi.evaluation.knn import DEFAULT_KS, TEMPERATURE, weighted_knn
from dinov2_equi.evaluation.labelled import image_batches, matching_labels
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.run.command import EXIT_DONE, add_device, add_knn_devices, command_parser, run_command
from dinov2_equi.run.load import CONFIG_FILE, DATA_FORMS, RANDOM, is_run, load_eval_model

DEFAULT_ARCH = "vit_small"
NETWORKS = (
    "random: an untrained network, see --arch; pixels: 16 x 16 of them and no network; or a weight file, "
    "hub:dinov2_vits14, timm:NAME, transformers:NAME_OR_FOLDER"
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="WEIGHTS", help=NETWORKS)
    source.add_argument("--run", type=Path, metavar="DIR", help="a training run: its teacher and config.yaml")
    parser.add_argument("--arch", help=f"architecture, for random (default: {DEFAULT_ARCH})")
    parser.add_argument("--patch-size", type=int, default=16, help="patch side in pixels, for random (default: 16)")
    parser.add_argument("--train", required=True, metavar="DATA", help=f"images that vote: {DATA_FORMS}")
    parser.add_argument("--val", required=True, metavar="DATA", help="images that are classified, likewise")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (default: 224)")
    parser.add_argument(
        "--k", type=int, nargs="+", default=list(DEFAULT_KS), help="numbers of neighbours (default: 10 20 100 200)"
    )
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help=f"of the votes (default: {TEMPERATURE})")
    parser.add_argument(
        "--features", choices=PLAIN_FEATURES, default="cls", help="class token (default), mean patch token or both"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images in one forward pass (default: 64)")
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that decode images (default: 0, in this one)"
    )
    add_device(parser)
    add_knn_devices(parser)
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: knn.json in the run, or here without one")
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = (args.run or Path()) / "knn.json"
    return args


def load_model(args: argparse.Namespace) -> EvalModel:
    """Return the backbone that the arguments name.

    Raises:
        ValueError: if --run is no run, or --arch is given beside weights that say it themselves.
    """
    if args.run is not None:
        if not is_run(args.run):
            raise ValueError(f"--run {args.run} is no run: it holds no {CONFIG_FILE}")
        return load_eval_model(str(args.run))
    if args.weights != RANDOM:
        if args.arch is not None:
            raise ValueError(f"--arch is for --weights random; {args.weights} says its architecture itself")
        return load_eval_model(args.weights, size=args.size)
    spec = f"{RANDOM}:{args.arch or DEFAULT_ARCH}/{args.patch_size}"
    return load_eval_model(spec, size=args.size, seed=args.seed)


def run(args: argparse.Namespace) -> dict[int, float]:
    """Return the accuracy for each k, after writing them to `args.output`."""
    model = load_model(args)
    channels = shared_channels([model])
    train, val = make_dataset(args.train, channels), make_dataset(args.val, channels)
    train_labels, val_labels = matching_labels(train, val)
    ks = [k for k in args.k if k <= len(train)]
    if not ks:
        raise ValueError(
            f"every k of {args.k} is larger than the training set of {len(train)} images; give a smaller --k"
        )
    model.check_size(args.size)
    model.to(args.device)

    def features(dataset: ImageDataset) -> Tensor:
        transform = EvalTransform(args.size)
        batches = image_batches(dataset, transform, batch_size=args.batch_size, num_workers=args.num_workers)
        pooled = model.features(batches, device=args.device, batch_size=args.batch_size)
        return select_features(pooled, args.features)

    accuracy = weighted_knn(
        features(train),
        train_labels,
        features(val),
        val_labels,
        ks=ks,
        temperature=args.temperature,
        devices=args.knn_devices or [args.device],
    )
    write_results(
        args.output,
        {"top1": {str(k): value for k, value in accuracy.items()}, "num_train": len(train), "num_val": len(val)},
        task="knn",
        seed=args.seed,
        settings={key: value for key, value in vars(args).items() if key not in ("output", "seed")},
    )
    return accuracy


def command(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    accuracy = run(args)
    print(f"k-NN accuracy of {args.weights or args.run}, {args.features} features at {args.size} px")
    print("    k   top-1")
    for k, value in accuracy.items():
        print(f"{k:5d}  {100 * value:5.1f} %")
    left_out = [k for k in args.k if k not in accuracy]
    if left_out:
        print(f"left out, larger than the training set: k = {', '.join(map(str, left_out))}")
    print(f"written to {args.output}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
