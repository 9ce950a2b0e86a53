"""Fine-tune a whole backbone to classify images.

    python eval/classification/finetune.py --weights runs/mine --data FOLDER --epochs 50
    python eval/classification/finetune.py --weights hub:dinov2_vits14 --data FOLDER --size 224 --set lr=1e-4 mixup=0

FOLDER holds train/ and val/, each with one sub-folder a class. The recipe is AdamW with layer-wise learning rates,
warm-up and cosine, RandAugment, mixup, CutMix and label smoothing; `--set` changes any of its settings.

Writes `results.json` and the classifier of the last pass, `classifier.pth`. Each pass leaves a checkpoint in the output
folder: after a stop the same command goes on with the pass that was not finished, to the same result.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import yaml

from dinov2_equi.data.datasets.make import make_train_and_val
from dinov2_equi.evaluation.eval_model import check_photographs
from dinov2_equi.evaluation.finetune import (
    AugmentedImages,
    Classifier,
    FinetuneResult,
    FinetuneSettings,
    PlainImages,
    finetune,
)
from dinov2_equi.evaluation.labelled import matching_labels
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.stored_features import dataset_digest, weights_digest
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import DATA_FORMS, OWN_FORMS, load_eval_model

RESULTS_FILE, CLASSIFIER_FILE, CHECKPOINTS = "results.json", "classifier.pth", "checkpoints"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, metavar="WEIGHTS", help=f"one of: {OWN_FORMS}")
    add("--data", metavar="FOLDER", help="with train/ and val/, each with one sub-folder a class")
    add("--train", metavar="DATA", help=f"instead of --data, images to train on: {DATA_FORMS}")
    add("--val", metavar="DATA", help="images that are classified after each pass, likewise")
    add("--size", type=int, help="image side, pixels (default: the one the backbone was trained at)")
    own = FinetuneSettings()
    add("--epochs", type=int, default=own.epochs, help=f"passes over the training images (default: {own.epochs})")
    names = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(own) if f.name != "epochs")
    add(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help=f"other settings of the recipe; the defaults are {names}",
    )
    add("--num-workers", type=int, default=0, help="processes that make crops")
    add_device(parser)
    add(
        "--output", type=Path, default=Path("finetune"), metavar="DIR", help="folder of the results (default: finetune)"
    )
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> FinetuneSettings:
    """Return the recipe.

    Raises:
        ValueError: for a name that the recipe lacks, or a value of another kind.
    """
    known = {f.name: f.default for f in dataclasses.fields(FinetuneSettings)}
    changes: dict[str, Any] = {"epochs": args.epochs}
    for word in args.set:
        name, separator, text = word.partition("=")
        if not separator or name not in known:
            raise ValueError(f"--set takes NAME=VALUE with a name of {', '.join(known)}; got {word!r}")
        kind = type(known[name])
        try:
            changes[name] = kind(yaml.safe_load(text)) if kind is int else float(text)
        except (TypeError, ValueError):
            raise ValueError(f"--set {name} takes a number, got {text!r}") from None
    if "warmup_epochs" not in changes:
        changes["warmup_epochs"] = min(FinetuneSettings.warmup_epochs, args.epochs // 10)
    settings = FinetuneSettings(**changes)
    settings.check()
    return settings


def run(args: argparse.Namespace) -> FinetuneResult:
    """Fine-tune, write results and classifier, and return what was reached."""
    settings = read_settings(args)
    model = load_eval_model(args.weights)
    check_photographs(model)
    train, val = make_train_and_val(args.data, args.train, args.val)
    train_labels, val_labels = matching_labels(train, val)
    size = args.size or model.image_size
    model.check_size(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        classifier = Classifier(model, int(train_labels.max()) + 1).to(args.device)
    store = CheckpointStore(args.output / CHECKPOINTS, keep=1)
    steps_an_epoch = len(train) // settings.batch_size
    done = (store.latest_step() or 0) * steps_an_epoch
    with training_progress(settings.epochs * steps_an_epoch, done) as progress:
        result = finetune(
            classifier,
            AugmentedImages(train, size, settings),
            PlainImages(val, val_labels, size),
            settings,
            device=args.device,
            num_workers=args.num_workers,
            on_step=lambda loss: progress.update(progress.steps_done + 1, {"loss": loss}),
            store=store,
            identity={
                "weights": weights_digest(classifier),
                "train images": dataset_digest(train),
                "val images": dataset_digest(val),
                "size": size,
            },
        )
    described = {key: value for key, value in vars(args).items() if key not in ("output", "set")}
    write_results(
        args.output / RESULTS_FILE,
        {model.name: {"top1": result.top1[-1], "top1_by_epoch": result.top1, "train_loss": result.train_loss}},
        task="finetune",
        seed=settings.seed,
        settings=described | {"size": size, "recipe": dataclasses.asdict(settings)},
    )
    pending = args.output / f".{CLASSIFIER_FILE}.tmp"
    torch.save({"model": classifier.state_dict(), "classes": train.classes}, pending)
    pending.replace(args.output / CLASSIFIER_FILE)
    return result


def command(args: argparse.Namespace) -> int:
    """Fine-tune, and say what was reached."""
    result = run(args)
    print(f"top-1 after {args.epochs} passes: {100 * result.top1[-1]:.1f} %")
    print(f"written: {args.output / RESULTS_FILE}, {args.output / CLASSIFIER_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
