"""One runner for all dense tasks: it trains a head, measures it, and writes numbers and a picture.

What differs between tasks is a `DenseTask`; each script in `eval/` holds one. Several processes, started by torchrun or
as a SLURM job, divide the images of each step and those that are measured among them, and the first one writes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from matplotlib.figure import Figure
from torch import nn

from dinov2_equi.distributed.collectives import largest_of_ranks, wait_for_all_ranks
from dinov2_equi.distributed.env import get_rank, get_world_size, is_main_process, share_of_batch
from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.dense.training import WITHOUT_EFFECT, LoopSettings, Losses, TrainingSamples, train
from dinov2_equi.evaluation.eval_model import EvalModel, check_photographs
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.stored_features import weights_digest
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run import launch
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, is_out_of_memory
from dinov2_equi.run.launch import shown_progress
from dinov2_equi.run.load import FORMS, load_eval_model
from dinov2_equi.train.stopping import RunStopped, StopRequest

RESULTS_FILE, PICTURE_FILE = "results.json", "predictions.png"
_CURVE_POINTS = 100

MEMORY_OF_MEASURING = "the training is done and saved; the same command measures, maybe on another --device"
"""Advice where memory runs out after the training: settings that were other ones would be another training."""

SettingsT = TypeVar("SettingsT", bound=LoopSettings)
ModelT = TypeVar("ModelT", bound=nn.Module)
DataT = TypeVar("DataT", bound="DenseData")


class DenseData(Protocol):
    """A split of a data set."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def name(self, index: int) -> str:
        """Return the path of an image."""
        ...


@dataclass(frozen=True)
class TaskRun(Generic[SettingsT, DataT, ModelT]):
    """One training of a task.

    Attributes:
        name: of the backbone.
        args: the command line.
        settings: the recipe.
        model: what is trained.
        val: images that are measured.
        identity: what the training depends on.
    """

    name: str
    args: argparse.Namespace
    settings: SettingsT
    model: ModelT
    val: DataT
    identity: Mapping[str, Any]


class DenseTask(ABC, Generic[SettingsT, DataT, ModelT]):
    """What a dense task is beside the run of it.

    Attributes:
        name: in the results, and of the folder that is written to by default.
        settings: their data class, with a method `check`.
        layouts: known forms of the data.
        needs_data: whether `--data` has to be given.
    """

    name: ClassVar[str]
    settings: type[SettingsT]
    layouts: ClassVar[Sequence[str]]
    needs_data: ClassVar[bool] = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that this task alone has."""

    def check(self, args: argparse.Namespace) -> None:
        """Raise where it can be seen at once that the command fails: before it waits in a queue, or after an hour.

        Raises:
            ValueError: a command line that this task cannot do.
            ImportError: a library is missing.
        """

    def memory_advice(self, settings: SettingsT) -> str:
        """Return which settings to lower where memory runs out."""
        return f"lower batch_size (now {settings.batch_size}), or take smaller crops or images, by --set"

    @abstractmethod
    def load_data(self, args: argparse.Namespace) -> tuple[DataT, DataT]:
        """Return images to train on and images to measure on."""

    @abstractmethod
    def facts(self, train: DataT) -> dict[str, Any]:
        """Return what the head depends on of the data, beside the images."""

    @abstractmethod
    def build(self, backbone: EvalModel, settings: SettingsT, train: DataT) -> ModelT:
        """Return the backbone with a new head, drawn from torch's random numbers."""

    @abstractmethod
    def backbone_of(self, model: ModelT) -> nn.Module:
        """Return the part of a model that may be frozen."""

    @abstractmethod
    def augmentation(self, settings: SettingsT, train: DataT) -> Callable[[int], Any]:
        """Return a function from the number of an image to a training sample."""

    def collate(self) -> Callable[[list[Any]], Any] | None:
        """Return what makes a batch of samples; None: torch's own."""
        return None

    @abstractmethod
    def losses(self, model: ModelT, batch: Any, settings: SettingsT, device: str) -> Losses:
        """Return the terms of the loss; see `training.Losses`."""

    def after_step(self, run: TaskRun[SettingsT, DataT, ModelT], step: int) -> None:
        """Do what is due after `step` steps, in every process; the model may be left in evaluation mode.

        What there is to save is saved by then. A training that goes on begins with a call for the steps done.
        """

    @abstractmethod
    def evaluate(self, run: TaskRun[SettingsT, DataT, ModelT], on_image: Callable[[], None]) -> dict[str, Any]:
        """Return the measures; every process calls it, and `on_image` after each image of its share."""

    def baselines(self, train: DataT, val: DataT, device: str) -> dict[str, Any]:
        """Return the measures of what needs no backbone, by name; every process calls it."""
        return {}

    def about_training(
        self, run: TaskRun[SettingsT, DataT, ModelT], found: Mapping[str, Any], losses: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return more numbers of the training, by name, and write files of them; the first process alone calls it.

        Args:
            run: the training, done.
            found: what was measured after it.
            losses: of `loss_curve`.
        """
        return {}

    @abstractmethod
    def figure(self, run: TaskRun[SettingsT, DataT, ModelT]) -> Figure:
        """Return photographs with what is true and what was found."""

    @abstractmethod
    def table(self, name: str, found: Mapping[str, Any]) -> str:
        """Return the measures of a backbone as text."""


AnyTask = DenseTask[Any, Any, Any]


def run_dense_task(
    task: AnyTask,
    description: str | None,
    script: Path,
    argv: Sequence[str] | None,
    command: Callable[[AnyTask, argparse.Namespace], str] | None = None,
) -> int:
    """Run the command of a task and return its exit code; a fault of the input ends in one line on stderr.

    Args:
        task: what is trained and measured.
        description: of the script, as its docstring.
        script: its file.
        argv: the words of the command; None: those of this process.
        command: trains, measures, writes and returns the table as text; None: `train_and_measure`.
    """

    def here(args: argparse.Namespace) -> int:
        shown = (command or train_and_measure)(task, args)
        if is_main_process():
            print(shown)
            print(f"written: {args.output / RESULTS_FILE}, {args.output / PICTURE_FILE}")
        return EXIT_DONE

    def check(args: argparse.Namespace) -> None:
        read_task_settings(task, args)
        task.load_data(args)
        check_photographs(load_eval_model(args.weights))

    return launch.run_launched(
        here,
        dense_parser(task, description),
        argv,
        script=script,
        check=check,
        interrupted="stopped; the same command goes on from the last checkpoint",
    )


def dense_parser(task: AnyTask, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a task's command line."""
    names = ", ".join(field.name for field in dataclasses.fields(task.settings))
    parser = command_parser(description)
    add = parser.add_argument
    add("--weights", required=True, metavar="WEIGHTS", help=f"one of: {FORMS}")
    add("--data", type=Path, required=task.needs_data, metavar="FOLDER", help="of the data set")
    first = task.layouts[0]
    add("--layout", choices=tuple(task.layouts), default=first, help=f"how it lies there (default: {first})")
    add("--config", type=Path, metavar="FILE", help="YAML with settings; some lie in configs/ beside the script")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help=f"settings: {names}")
    add("--num-workers", type=int, default=0, help="processes that load images")
    add("--pictures", type=int, default=4, metavar="N", help="images in predictions.png (default: 4)")
    task.add_arguments(parser)
    add_device(parser)
    add("--output", type=Path, default=Path(task.name), metavar="DIR", help=f"default: {task.name}")
    launch.add_arguments(parser)
    return parser


def read_task_settings(task: AnyTask, args: argparse.Namespace) -> Any:
    """Return the checked settings that the command line names.

    Raises:
        ValueError: settings out of range, or of another kind, or a batch that the processes cannot divide, or a command
            line that the task cannot do.
        OSError: a file cannot be read.
        ImportError: a library is missing.
    """
    settings = read_settings(task.settings, args.config, args.set)
    settings.check()
    share_of_batch(settings.batch_size, launch.num_processes(args))
    task.check(args)
    return settings


def train_and_measure(task: AnyTask, args: argparse.Namespace) -> str:
    """Train, measure and write everything; return the table as text. Every process of a group must call it."""
    settings = read_task_settings(task, args)
    train_set, val = task.load_data(args)
    backbone = load_eval_model(args.weights, seed=settings.seed).to(args.device)
    check_photographs(backbone)
    identity = identity_of(task, args, backbone, settings, train_set)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = task.build(backbone, settings, train_set).to(args.device)
    run = TaskRun(backbone.name, args, settings, model, val, identity)
    setup_logging(args.output, get_rank())
    with StopRequest().listening() as stop:
        with explained_memory(task.memory_advice(settings)):
            history = _train(task, run, train_set, stop)
        with explained_memory(MEMORY_OF_MEASURING):
            found = _measure(task, run, stop) | task.baselines(train_set, val, args.device)
    if is_main_process():
        write_outputs(task, run, train_set, found, history)
    wait_for_all_ranks()
    return task.table(backbone.name, found)


def _measure(task: AnyTask, run: TaskRun[Any, Any, Any], stop: StopRequest) -> dict[str, Any]:
    """Measure, while a display shows how far it is; see `measuring`."""
    with measuring(len(run.val), run.settings, stop, run.args.device) as advance:
        return task.evaluate(run, advance)


@contextlib.contextmanager
def measuring(num_images: int, settings: LoopSettings, stop: StopRequest, device: str) -> Iterator[Callable[[], None]]:
    """Show how far a measurement is; the block is given what is to be called after each image of a process.

    Args:
        num_images: of all processes.
        settings: of the training, which is done.
        stop: whether the command shall end.
        device: of this process.

    Raises:
        RunStopped: on a signal; of several processes once the measurement is finished.
    """
    with shown_progress(num_images) as progress:

        def advance() -> None:
            if get_world_size() == 1:  # of several, one would leave the others waiting for what it has measured
                _stop_if_asked(stop.signal, settings.steps)
            progress.update(min(progress.steps_done + get_world_size(), num_images))

        yield advance
    _stop_if_asked(largest_of_ranks(stop.signal, device), settings.steps)


def write_outputs(
    task: AnyTask, run: TaskRun[Any, Any, Any], train_set: Any, found: Mapping[str, Any], history: Sequence[float]
) -> None:
    """Write results and picture of a training.

    Args:
        task: what was trained and measured.
        run: the training, done.
        train_set: images that were trained on.
        found: what was measured after it.
        history: the loss of every step.
    """
    args, settings, losses = run.args, run.settings, loss_curve(history)
    recipe = {"num_train_images": len(train_set), "recipe": dataclasses.asdict(settings)}
    write_results(
        args.output / RESULTS_FILE,
        {run.name: {**found, **task.about_training(run, found, losses), "train_loss": losses}},
        task=task.name,
        seed=settings.seed,
        settings=launch.described(args) | recipe | task.facts(train_set),
    )
    write_figure(args.output / PICTURE_FILE, task.figure(run))


def identity_of(
    task: AnyTask, args: argparse.Namespace, backbone: EvalModel, settings: Any, train_set: Any
) -> dict[str, Any]:
    """Return the `training_identity` of a task."""
    names = [train_set.name(index) for index in range(len(train_set))]
    return training_identity(args, backbone, dataclasses.asdict(settings) | task.facts(train_set), names)


def _train(task: AnyTask, run: TaskRun[Any, Any, Any], train_set: Any, stop: StopRequest) -> list[float]:
    """Train, or go on with a training that was stopped, while a display shows how far it is.

    Raises:
        RunStopped: on a signal, once the step is finished and saved.
    """
    args, settings, model = run.args, run.settings, run.model
    with shown_progress(settings.steps, images_per_step=settings.batch_size) as progress:

        def after_save(done: int) -> None:
            task.after_step(run, done)
            model.train()

        history = train(
            model,
            task.backbone_of(model),
            lambda batch: task.losses(model, batch, settings, args.device),
            TrainingSamples(task.augmentation(settings, train_set), len(train_set), settings.seed),
            settings=settings,
            folder=args.output,
            identity=run.identity,
            num_workers=args.num_workers,
            collate=task.collate(),
            on_step=progress.update,
            after_save=after_save,
            asked_to_stop=lambda: stop.signal > 0,
        )
    if len(history) < settings.steps:
        raise RunStopped(largest_of_ranks(stop.signal, args.device), len(history))
    _stop_if_asked(largest_of_ranks(stop.signal, args.device), settings.steps)
    return history


def _stop_if_asked(signal: int, step: int) -> None:
    if signal:
        raise RunStopped(signal, step)


@contextlib.contextmanager
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
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"there is not enough memory: {advice}") from error


def training_identity(
    args: argparse.Namespace, model: EvalModel, settings: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Return what a training depends on: backbone, data and settings; a checkpoint of another one is refused."""
    digest = hashlib.sha256("\0".join(Path(name).name for name in names).encode()).hexdigest()
    kept = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    return {"weights": weights_digest(model.backbone), "layout": args.layout, "images": digest, "settings": kept}


def loss_curve(history: Sequence[float]) -> dict[str, list[float]]:
    """Return a hundred means of the loss over equal stretches of the training, and the step that ends each."""
    count = min(len(history), _CURVE_POINTS)
    ends = [len(history) * (number + 1) // count for number in range(count)]
    starts = [0, *ends[:-1]]
    return {
        "step": [float(end) for end in ends],
        "loss": [sum(history[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)],
    }
