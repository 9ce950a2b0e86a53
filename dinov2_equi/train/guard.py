"""What happens after a step whose loss or gradient is NaN or infinite: skip it, go back, stop."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.train.replay import write_bundle
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import TrainState, random_state
from dinov2_equi.train.step import NonFiniteLossError, train_step

logger = logging.getLogger(__name__)


class GuardedSteps:
    """Runs the steps of a run; one that is not finite changes no weight, and the run goes on with the next images.

    After `train.max_nonfinite_steps` of them in a row the weights may be at fault: the run goes back to those of its
    last checkpoint, with the images that come next. Where that checkpoint has been tried already, or there is none, it
    stops and leaves what is needed to meet the step again. All ranks decide alike, and so does a run that is resumed.
    """

    def __init__(
        self, state: TrainState, cfg: Config, *, store: CheckpointStore, device: torch.device, output_dir: Path
    ) -> None:
        self._state = state
        self._cfg = cfg
        self._store = store
        self._device = device
        self._output_dir = output_dir
        self._limit = cfg.train.max_nonfinite_steps
        self._num_in_a_row = 0
        self._went_back_to: int | None = None

    @property
    def is_sound(self) -> bool:
        """Return whether the last step was finite."""
        return self._num_in_a_row == 0

    def run(self, batch: Batch, values: StepValues) -> dict[str, float] | None:
        """Run one step and return its figures, or None if it was skipped.

        Raises:
            NonFiniteLossError: if too many steps in a row were not finite; names the bundle for `scripts/replay.py`.
        """
        rng = random_state()
        try:
            figures = train_step(self._state, batch, values, self._cfg, self._device)
        except NonFiniteLossError as error:
            self._skip(error, batch, rng, values.teacher_temp)
            return None
        self._num_in_a_row = 0
        return figures | ({"skipped_steps": float(self._state.skipped)} if self._state.skipped else {})

    def _skip(self, error: NonFiniteLossError, batch: Batch, rng: dict[str, Tensor], teacher_temp: float) -> None:
        self._state.step += 1
        self._state.skipped += 1
        self._num_in_a_row += 1
        logger.warning("%s. The step is skipped (%d of %d in a row)", error, self._num_in_a_row, self._limit)
        if self._num_in_a_row < self._limit:
            return
        self._store.wait()  # all ranks see the same checkpoints then
        last = self._store.latest_step()
        if last is None or last == self._went_back_to:
            self._stop(error, batch, rng, teacher_temp)
        self._go_back()

    def _go_back(self) -> None:
        checkpoint = self._store.load()
        step, skipped = self._state.step, self._state.skipped
        self._state.restore(checkpoint)
        self._state.step, self._state.skipped = step, skipped  # other images than those that led here
        self._went_back_to, self._num_in_a_row = checkpoint.step, 0
        logger.warning("back to the weights of step %d, going on with the images of step %d", checkpoint.step, step)

    def _stop(self, error: NonFiniteLossError, batch: Batch, rng: dict[str, Tensor], teacher_temp: float) -> None:
        bundle = write_bundle(self._output_dir, self._state, self._cfg, batch=batch, rng=rng, teacher_temp=teacher_temp)
        where = f". To look at it: python scripts/replay.py {bundle}"
        tried = "there is no checkpoint yet"
        if self._went_back_to is not None:
            tried = f"going back to the checkpoint of step {self._went_back_to} did not help"
        raise NonFiniteLossError(
            f"{self._num_in_a_row} steps in a row were not finite, and {tried}; the last was {error}. Lower "
            "optim.base_lr or equi.loss_weight, lengthen optim.warmup_epochs, or look at the images of this "
            f"step{where}"
        ) from error
