"""What the scripts of the dense tasks share: arguments, training with progress, and how they end."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2_equi.evaluation.dense.training import WITHOUT_EFFECT, LoopSettings, Losses, TrainingSamples, train
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.stored_features import weights_digest
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import FORMS, load_eval_model

RESULTS_FILE, PICTURE_FILE = "results.json", "predictions.png"
_CURVE_POINTS = 100
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""A plain RuntimeError of PyTorch with these words is the machine's memory running out."""


def dense_parser(
    description: str, *, layouts: Sequence[str], settings: str, output: str, needs_data: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every dense task has.

    Args:
        description: of the script, as its docstring.
        layouts: known forms of the data.
        settings: names of the settings, for the help.
        output: folder written to by default.
        needs_data: the folder of the data must be given.
    """
    parser = command_parser(description)
    add = parser.add_argument
    add("--weights", required=True, metavar="WEIGHTS", help=f"one of: {FORMS}")
    add("--data", type=Path, required=needs_data, metavar="FOLDER", help="of the data set")
    add("--layout", choices=tuple(layouts), default=layouts[0], help=f"how it lies there (default: {layouts[0]})")
    add("--config", type=Path, metavar="FILE", help="YAML with settings; some lie in configs/ beside the script")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help=f"settings: {settings}")
    add("--num-workers", type=int, default=0, help="processes that load images")
    add("--pictures", type=int, default=4, metavar="N", help="images in predictions.png (default: 4)")
    add_device(parser)
    add("--output", type=Path, default=Path(output), metavar="DIR", help=f"default: {output}")
    return parser


def load_backbone(args: argparse.Namespace, seed: int) -> EvalModel:
    """Return the backbone that the command line names, on the device that it names."""
    return load_eval_model(args.weights, seed=seed).to(args.device)


def training_identity(
    args: argparse.Namespace, model: EvalModel, settings: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Return what a training depends on: backbone, data and settings; a checkpoint of another one is refused."""
    digest = hashlib.sha256("\0".join(Path(name).name for name in names).encode()).hexdigest()
    kept = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    return {"weights": weights_digest(model.backbone), "layout": args.layout, "images": digest, "settings": kept}


def train_with_progress(
    module: nn.Module,
    backbone: nn.Module,
    losses_of: Callable[[Any], Losses],
    samples: TrainingSamples,
    loop: LoopSettings,
    *,
    args: argparse.Namespace,
    identity: Mapping[str, Any],
    collate: Callable[[list[Any]], Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train, or go on with a training that was stopped, while a display shows how far it is; see `train`.

    `on_step` is called after each step with the number of steps done, and may measure the module.
    """
    setup_logging(args.output)
    with training_progress(loop.steps, images_per_step=loop.batch_size) as progress:

        def after_step(done: int, terms: Losses) -> None:
            progress.update(done, terms)
            if on_step is not None:
                on_step(done)
                module.train()

        return train(
            module,
            backbone,
            losses_of,
            samples,
            settings=loop,
            folder=args.output,
            identity=identity,
            num_workers=args.num_workers,
            collate=collate,
            on_step=after_step,
        )


@contextmanager
def explained_memory(advice: str) -> Iterator[None]:
    """Say what to change where memory runs out, of the device or of the machine.

    Args:
        advice: which settings to lower, with their values.

    Raises:
        ValueError: with the advice, in place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _CPU_ALLOCATOR not in str(error):
            raise
        raise ValueError(f"there is not enough memory: {advice}") from error


def loss_curve(history: Sequence[float]) -> dict[str, list[float]]:
    """Return a hundred means of the loss over equal stretches of the training, and the step that ends each."""
    count = min(len(history), _CURVE_POINTS)
    ends = [len(history) * (number + 1) // count for number in range(count)]
    starts = [0, *ends[:-1]]
    return {
        "step": [float(end) for end in ends],
        "loss": [sum(history[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)],
    }


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return the command line as it is written to the results."""
    return {name: value for name, value in vars(args).items() if name not in ("output", "set", "config")}


def run_to_exit_code(run: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Run a task, print what it returns and where it wrote, and return the exit code; see `run_command`."""

    def command(args: argparse.Namespace) -> int:
        print(run(args))
        print(f"written: {args.output / RESULTS_FILE}, {args.output / PICTURE_FILE}")
        return EXIT_DONE

    return run_command(command, args, interrupted="stopped; the same command goes on from the last checkpoint")
