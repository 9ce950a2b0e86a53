"""mmengine's training loop, made to go on exactly where it was stopped, from files of tensors and plain values."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop

from dinov2_equi.distributed.collectives import largest_of_ranks, wait_for_all_ranks
from dinov2_equi.distributed.env import is_main_process
from dinov2_equi.evaluation.dense.training import (
    LoopSettings,
    Losses,
    check_finite,
    check_same_training,
    set_learning_rates,
    step_seed,
)
from dinov2_equi.train.stopping import RunStopped, StopRequest

_NAME = re.compile(r"step_(\d+)\.pth")
_KEPT = 2
_TEMPORARY = ".tmp"
_OF_LAYER = re.compile(r"\.d\d+\.")  # terms of mask2former's layers but the last


@LOOPS.register_module()
class PositionedTrainLoop(IterBasedTrainLoop):
    """Learning rates and random numbers of a step depend on its number alone, as in the plain path.

    The loader begins with the samples of the first step that is still to be done; mmengine's own loop would read all
    those before it again and throw them away.

    Args:
        runner: mmengine's.
        dataloader: of the steps that are to be done.
        settings: the recipe.
    """

    dataloader_iterator: Iterator[Any]

    def __init__(self, runner: Any, dataloader: Any, settings: LoopSettings) -> None:
        super().__init__(runner, dataloader, max_iters=settings.steps)
        self._settings = settings

    def run(self) -> Any:
        """Train, and return the model."""
        done = itertools.repeat(None, self._iter)  # taken and ignored by mmengine's loop
        self.dataloader_iterator = itertools.chain(done, self.dataloader_iterator)
        try:
            return super().run()
        finally:
            self.dataloader_iterator = iter(())  # its loader processes end; the runner would keep them to the exit

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        """Make a step."""
        set_learning_rates(self.runner.optim_wrapper.optimizer, self._settings, self._iter)
        torch.manual_seed(step_seed(self._settings, self._iter))
        super().run_iter(data_batch)


class StepHook(Hook):
    """Shows progress, and ends a training whose loss is not finite before anything of it is written.

    Args:
        on_step: called with the number of steps done and the terms of the loss.
    """

    def __init__(self, on_step: Callable[[int, Losses], None]) -> None:
        self._on_step = on_step

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the loss of a step."""
        terms = {name: value.detach() for name, value in outputs.items() if "loss" in name}
        check_finite(terms, batch_idx)
        self._on_step(batch_idx + 1, {name: value for name, value in terms.items() if not _OF_LAYER.search(name)})


class SaveHook(Hook):
    """Writes checkpoints that a crash cannot spoil, without a frozen backbone, and refuses those of another training.

    mmengine writes its histories of numbers as pickled objects with `getattr` in them; a reader that allows that allows
    anything. Here they are written as tensors, so that `torch.load` reads the files in its safe mode as it is.

    Args:
        folder: they go there.
        every: steps between two.
        identity: what the training depends on.
        left_out: names of the tensors of the model that are not written.
        stop: whether the training shall end after the step and its checkpoint.
    """

    priority = "VERY_LOW"

    def __init__(
        self, folder: Path, every: int, identity: Mapping[str, Any], left_out: set[str], stop: StopRequest
    ) -> None:
        self._folder, self._every, self._identity, self._left_out = folder, every, dict(identity), left_out
        self._stop = stop

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write one, where it is time to; of several processes the first one does.

        Raises:
            RunStopped: one of the processes was asked to; the step is written.
        """
        step = batch_idx + 1
        signal = largest_of_ranks(self._stop.signal, next(runner.model.parameters()).device)
        if is_main_process() and (step % self._every == 0 or step == runner.max_iters or signal):
            self._save(runner, step)
        if signal:
            wait_for_all_ranks()  # a launcher may end the others once one has ended
            raise RunStopped(signal, step)

    def _save(self, runner: Any, step: int) -> None:
        """Write a checkpoint and remove those before the last two."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{os.getpid()}{_TEMPORARY}"
        try:
            runner.save_checkpoint(str(self._folder), temporary.name, by_epoch=False)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self._folder / f"step_{step}.pth")
        finally:
            temporary.unlink(missing_ok=True)
        for path in list(_checkpoints(self._folder).values())[:-_KEPT]:
            path.unlink()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Leave out what is read from elsewhere, turn histories to tensors, and note whose training it is."""
        state, hub = checkpoint["state_dict"], checkpoint["message_hub"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in self._left_out}
        hub["log_scalars"] = {
            name: [torch.as_tensor(part) for part in history.data] for name, history in hub["log_scalars"].items()
        }
        checkpoint["meta"]["identity"] = self._identity

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another training, and put back what was left out and changed.

        Raises:
            ValueError: names what differs.
        """
        check_same_training(checkpoint["meta"].get("identity", {}), self._identity, self._folder)
        own = runner.model.state_dict()
        checkpoint["state_dict"].update({name: own[name] for name in self._left_out})
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {
            name: HistoryBuffer(*(part.cpu().numpy() for part in parts)) for name, parts in hub["log_scalars"].items()
        }


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """Return the steps done by the newest whole checkpoint in a folder, and its file; 0 and None for none.

    What a process that was killed in the middle of one has left is removed. Every process of a group must call it.
    """
    if is_main_process():
        for path in folder.glob(f".*{_TEMPORARY}"):
            path.unlink()
    wait_for_all_ranks()
    found = _checkpoints(folder)
    return next(reversed(found.items()), (0, None))


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints by their steps, the newest last."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.pth") if zipfile.is_zipfile(path))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


@contextmanager
def readable(checkpoint: str | None) -> Iterator[None]:
    """Say in words, and as a fault of the input, where a checkpoint holds what torch's safe mode refuses.

    Raises:
        ValueError: names the file.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of this harness: it holds more than tensors and plain values, and is not "
            "read; remove it"
        ) from error


def loss_history(runner: Any) -> list[float]:
    """Return the losses of all steps, those before a stop among them."""
    values, _ = runner.message_hub.get_scalar("train/loss").data
    return [float(value) for value in values]
