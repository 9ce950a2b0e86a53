"""Can the rotation of an image be read from frozen features? Regression from image pairs, for one or several runs.

    python eval/equivariance/run.py --run runs/quickstart runs/control --train DIR/train --test DIR/val

Features (class token and mean patch token) of an image and of its rotated copy go into a perceptron that has to say
the angle. Prints R2 (1 perfect, 0 no better than the mean) and writes `equivariance.json` into each run. `--random`
measures the weights a run started from as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn

from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.equi.families import build_family
from dinov2_equi.evaluation.model import load_backbone
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.transform_regression import transform_regression
from dinov2_equi.train.build import build_initial_backbone
from dinov2_equi.train.build_model import family_settings
from dinov2_equi.train.settings import load_run_config


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, metavar="DIR", help="training runs")
    parser.add_argument("--train", required=True, metavar="DATA", help="images the regression learns from")
    parser.add_argument("--test", required=True, metavar="DATA", help="images it is tested on, others than --train")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels (default: 64)")
    parser.add_argument("--train-images", type=int, default=1500)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--draws", type=int, default=4, help="rotations of each image (default: 4)")
    parser.add_argument("--epochs", type=int, default=20, help="passes of the regression (default: 20)")
    parser.add_argument("--random", action="store_true", help="measure the weights before training as well")
    return parser.parse_args()


def main() -> None:
    """Measure every run and write its numbers into its folder."""
    args = parse_arguments()
    train_images = eval_images(make_dataset(args.train), args.size, args.train_images)
    test_images = eval_images(make_dataset(args.test), args.size, args.test_images)
    for run in args.run:
        cfg = load_run_config(run / "config.yaml")
        networks: dict[str, nn.Module] = {
            "trained": load_backbone(
                run / "teacher_backbone.safetensors",
                arch=cfg.student.arch,
                interpolate_offset=cfg.student.interpolate_offset,
                interpolate_antialias=cfg.student.interpolate_antialias,
            )
        }
        if args.random:
            networks["random"] = build_initial_backbone(cfg)
        numbers = {}
        for name, backbone in networks.items():
            numbers[f"r2_rotation_{name}"] = transform_regression(
                backbone,
                build_family("rotation", family_settings(cfg)),
                train_images,
                test_images,
                num_train_pairs=args.draws * len(train_images),
                num_test_pairs=args.draws * len(test_images),
                mean=cfg.data.mean,
                std=cfg.data.std,
                device=torch.device("cpu"),
                epochs=args.epochs,
                seed=0,
            ).r2_pooled
        settings = {key: value for key, value in vars(args).items() if key != "run"}
        write_results(run / "equivariance.json", numbers, task="transform_regression", seed=0, settings=settings)
        sys.stdout.write(f"{run}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
