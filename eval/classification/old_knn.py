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
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from dinov2_equi.evaluation.features import extract_features
from dinov2_equi.evaluation.knn import DEFAULT_KS, TEMPERATURE, weighted_knn
from dinov2_equi.evaluation.labelled import image_batches, matching_labels
from dinov2_equi.evaluation.model import RawPixels, load_backbone, random_backbone
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.run.allocator import keep_freed_memory
from dinov2_equi.run.load import load_run


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="FILE|random|pixels", help="a weight file, or one of the two baselines")
    source.add_argument("--run", type=Path, metavar="DIR", help="a training run: its teacher and config.yaml")
    parser.add_argument("--arch", help="architecture; read off the weight file unless given; vit_small for random")
    parser.add_argument("--patch-size", type=int, default=16, help="patch side in pixels, for random (default: 16)")
    parser.add_argument("--train", required=True, metavar="DATA", help="labelled images that vote")
    parser.add_argument("--val", required=True, metavar="DATA", help="labelled images that are classified")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (default: 224)")
    parser.add_argument("--k", type=int, nargs="+", default=list(DEFAULT_KS), help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help=f"of the votes ({TEMPERATURE})")
    parser.add_argument("--features", choices=("cls", "patch_mean", "both"), default="cls", help="default: cls")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: knn.json in the run, or here without one")
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = (args.run or Path()) / "knn.json"
    return args


def build_model(args: argparse.Namespace) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Return the model, and the mean and standard deviation that its images are normalised with."""
    if args.weights == "pixels":
        return RawPixels(), IMAGENET_MEAN, IMAGENET_STD
    if args.weights == "random":
        arch = args.arch or "vit_small"
        return (
            random_backbone(arch, img_size=args.size, patch_size=args.patch_size, seed=args.seed),
            IMAGENET_MEAN,
            IMAGENET_STD,
        )
    if args.weights is not None:
        return load_backbone(args.weights, arch=args.arch), IMAGENET_MEAN, IMAGENET_STD
    model = load_run(args.run)
    return model.backbone, model.mean, model.std


def run(args: argparse.Namespace) -> dict[int, float]:
    """Return the accuracy for each k, after writing them to `args.output`."""
    train, val = make_dataset(args.train), make_dataset(args.val)
    train_labels, val_labels = matching_labels(train, val)
    ks = [k for k in args.k if k <= len(train)]
    if not ks:
        raise ValueError(
            f"every k of {args.k} is larger than the training set of {len(train)} images; give a smaller --k"
        )
    model, mean, std = build_model(args)
    patch_size = getattr(model, "patch_size", 1)
    if args.size % patch_size:
        raise ValueError(f"--size {args.size} is no multiple of the patch size {patch_size}; give another --size")
    model.to(args.device)

    def features(dataset: ImageDataset) -> Tensor:
        transform = EvalTransform(args.size)
        batches = image_batches(dataset, transform, batch_size=args.batch_size, num_workers=args.num_workers)
        return extract_features(
            model,
            batches,
            mean=mean,
            std=std,
            device=args.device,
            batch_size=args.batch_size,
            select=args.features,
        )

    accuracy = weighted_knn(
        features(train), train_labels, features(val), val_labels, ks=ks, temperature=args.temperature
    )
    write_results(
        args.output,
        {"top1": {str(k): value for k, value in accuracy.items()}, "num_train": len(train), "num_val": len(val)},
        task="knn",
        seed=args.seed,
        settings={key: value for key, value in vars(args).items() if key not in ("output", "seed")},
    )
    return accuracy


def main(argv: list[str] | None = None) -> int:
    """Run the harness; a fault of the input ends in one line on stderr and exit status 1."""
    args = parse_arguments(argv)
    keep_freed_memory()
    try:
        accuracy = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"k-NN accuracy of {args.weights or args.run}, {args.features} features at {args.size} px")
    print("    k   top-1")
    for k, value in accuracy.items():
        print(f"{k:5d}  {100 * value:5.1f} %")
    left_out = [k for k in args.k if k not in accuracy]
    if left_out:
        print(f"left out, larger than the training set: k = {', '.join(map(str, left_out))}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
