"""The training loop: batches, steps, log lines, checkpoints; resumes by itself."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2_equi.config.derive import Derived
from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.data.bad_images import BadImageLog
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.loaders import on_device
from dinov2_equi.data.source_batch import SourceBatch
from dinov2_equi.distributed.collectives import largest_of_ranks, wait_for_all_ranks
from dinov2_equi.distributed.env import get_rank, get_world_size, is_main_process
from dinov2_equi.distributed.rank_group import rank_group
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.logging.metrics import MetricWriter
from dinov2_equi.logging.progress import training_progress
from dinov2_equi.train import build
from dinov2_equi.train.bad_images_of_ranks import gather_bad_images
from dinov2_equi.train.collapse import CollapseAlarm
from dinov2_equi.train.export import export_teacher
from dinov2_equi.train.guard import GuardedSteps
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import ResumeError, TrainState, check_same_run, seed_rank
from dinov2_equi.train.stopping import RunStopped, StopRequest
from dinov2_equi.train.watchdog import Watchdog
from dinov2_equi.train.whole import whole_model

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SAVE_FAILED = 1000
"""Told to the other ranks in place of a signal, all of which are smaller: a save in the background has failed."""

StepHook = Callable[[SSLMetaArch, int, MetricWriter], None]
"""Called with the model, the number of finished steps, and the writer: for pictures and measurements while training."""


def train(
    cfg: Config,
    derived: Derived,
    *,
    dataset: ImageDataset,
    device: torch.device,
    output_dir: Path,
    on_picture: StepHook | None = None,
    on_evaluation: StepHook | None = None,
) -> TrainState:
    """Train to `derived.total_steps`, going on from the newest sound checkpoint in `output_dir`.

    Args:
        cfg: validated configuration.
        derived: values that follow from it.
        dataset: training images.
        device: where to compute.
        output_dir: run folder; gets checkpoints, metrics, and the exported teacher.
        on_picture: called every `logging.pictures_every_steps` steps.
        on_evaluation: called every `evaluation.eval_period_iterations` steps, after the export of the teacher.

    Returns:
        The finished run, its model in evaluation mode; on the main process with all parameters.

    Raises:
        ResumeError: if the folder holds another run.
        NonFiniteLossError: if too many steps in a row were not finite, see `GuardedSteps`.
        CheckpointError: if a checkpoint could not be written; in the background, after one of the next steps.
        RunStopped: on a signal, once the step is finished and saved.
        TooManyBadImagesError: if more images than `data.max_bad_fraction` cannot be used.
    """
    store = CheckpointStore(output_dir / CHECKPOINTS, keep=cfg.train.checkpoint_keep, ranks=rank_group())
    wait_for_all_ranks()  # the main process clears what a crash left behind
    state = _start_or_resume(cfg, derived, store, device)
    if is_main_process():
        (output_dir / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    if state.step >= derived.total_steps:
        logger.info("the run is complete: %d of %d steps", state.step, derived.total_steps)
    else:
        hooks = ((cfg.logging.pictures_every_steps, on_picture), (cfg.evaluation.eval_period_iterations, on_evaluation))
        _run_steps(state, cfg, derived, store, dataset=dataset, output_dir=output_dir, hooks=hooks)
    state.model = whole_model(state.model, device) or state.model
    if is_main_process():
        export_teacher(state.model, output_dir)  # also after a stop between the last checkpoint and this line
    state.model.eval()
    return state


def load_finished(cfg: Config, derived: Derived, *, device: torch.device, output_dir: Path) -> TrainState:
    """Return the run of the newest sound checkpoint, its model in evaluation mode, without training.

    Raises:
        ResumeError: if there is no checkpoint, or it is of another run.
    """
    store = CheckpointStore(output_dir / CHECKPOINTS, read_only=True, ranks=rank_group())
    if store.latest_step() is None:
        raise ResumeError(f"there is no checkpoint in {store.directory}; train first, or name the run's folder")
    state = _start_or_resume(cfg, derived, store, device)
    state.model = whole_model(state.model, device) or state.model
    state.model.eval()
    return state


def _start_or_resume(cfg: Config, derived: Derived, store: CheckpointStore, device: torch.device) -> TrainState:
    torch.manual_seed(cfg.train.seed)
    is_new = store.latest_step() is None
    state = build.build_state(cfg, derived, device, resumes=not is_new)
    if is_new:
        if get_world_size() > 1:
            seed_rank(cfg.train.seed, 0)
        return state
    checkpoint = store.load()
    check_same_run(checkpoint, cfg)
    state.restore(checkpoint)
    logger.info("resumed after step %d from %s", state.step, store.directory)
    return state


def _run_steps(
    state: TrainState,
    cfg: Config,
    derived: Derived,
    store: CheckpointStore,
    *,
    dataset: ImageDataset,
    output_dir: Path,
    hooks: Sequence[tuple[int, StepHook | None]],
) -> None:
    """Run the steps that are left; a hook is called every so many steps."""
    device = state.device
    loader = build.build_loader(cfg, derived, dataset, start_step=state.step, pin_memory=device.type == "cuda")
    schedules = build.build_schedules(cfg, derived)
    steps = GuardedSteps(state, cfg, store=store, device=device, output_dir=output_dir)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(cfg.train.watchdog_seconds, output_dir, get_rank()).watching())
        stack.enter_context(store.waiting_at_the_end())  # watched as well
        writer = progress = None
        if is_main_process():
            kept = MetricWriter(output_dir, tensorboard=cfg.logging.tensorboard, start_step=state.step)
            writer = stack.enter_context(kept)
            shown = training_progress(derived.total_steps, state.step, images_per_step=derived.effective_batch_size)
            progress = stack.enter_context(shown)
        stop = stack.enter_context(StopRequest().listening())
        state.model.train()
        bad_images = BadImageLog(output_dir, cfg.data.max_bad_fraction, is_writer=is_main_process())
        watchdog.beat("waiting for the first images")
        alarm = CollapseAlarm(derived.warmup_steps)
        for batch, clock in _timed(loader):
            watchdog.beat(f"in step {state.step}")
            bad_images.record(derived.effective_batch_size, gather_bad_images(batch.bad_images, device))
            values = schedules.at(state.step)
            scalars = steps.run(on_device(batch, device), values)
            facts = _step_facts(values, clock.stop(derived.effective_batch_size), device)
            state.seconds += facts["time/step"]
            if scalars is not None and writer is not None and progress is not None:
                scalars |= alarm.look(state.step - 1, scalars) | facts | {"time/total": state.seconds}
                progress.update(state.step, scalars)
                if _is_logged(cfg, state.step, derived.total_steps):
                    writer.write(state.step - 1, scalars)
            watchdog.beat(f"saving after step {state.step - 1}")
            _periodic(state, cfg, derived, store, output_dir, is_sound=steps.is_sound)
            due = [hook for period, hook in hooks if hook is not None and _due(state.step, period)]
            with watchdog.paused() if due else contextlib.nullcontext():  # these take as long as they take
                _call_hooks(due, state, writer, device)
                number = largest_of_ranks(SAVE_FAILED if store.has_failed else stop.signal, device)
            if number == SAVE_FAILED:
                store.wait()  # raises on all ranks
            if number and state.step < derived.total_steps:
                state.save(store, cfg)
                raise RunStopped(number, state.step)
            watchdog.beat(f"waiting for the images of step {state.step}")


def _call_hooks(
    hooks: Sequence[StepHook], state: TrainState, writer: MetricWriter | None, device: torch.device
) -> None:
    """Call what is due after this step, in the process that writes the metrics; all gather the model for it."""
    for hook in hooks:
        whole = whole_model(state.model, device)
        if whole is not None and writer is not None:
            hook(whole, state.step, writer)
        state.model.train()


def _is_logged(cfg: Config, step: int, total_steps: int) -> bool:
    periods = (cfg.logging.metrics_every_steps, cfg.logging.diagnostics_every_steps)
    return step == 1 or any(_due(step, period, total_steps) for period in periods)


def _periodic(
    state: TrainState, cfg: Config, derived: Derived, store: CheckpointStore, output_dir: Path, *, is_sound: bool
) -> None:
    """Write what is due after this step: a checkpoint, and DINOv2's copy of the teacher for evaluation.

    In a row of steps that are not finite no checkpoint is written but the last: the one before it is to go back to.
    """
    due = is_sound and _due(state.step, derived.checkpoint_every_steps)
    is_last = state.step == derived.total_steps
    if due or is_last:
        state.save(store, cfg, in_background=cfg.train.async_checkpoint and not is_last)
    if _due(state.step, cfg.evaluation.eval_period_iterations):
        whole = whole_model(state.model, torch.device("cpu"))
        if whole is not None:
            export_teacher(whole, exported_teacher(output_dir, state.step))


def exported_teacher(output_dir: Path, step: int) -> Path:
    """Return the folder of the teacher after `step` steps; numbered as DINOv2 does."""
    return output_dir / "eval" / f"training_{step - 1}"


def _due(step: int, period: int, last: int | None = None) -> bool:
    return (period > 0 and step % period == 0) or step == last


@dataclass
class _StepClock:
    """Seconds spent waiting for the batch, and in the step."""

    started: float
    data_seconds: float

    def stop(self, batch_size: int) -> dict[str, float]:
        """Return the timings of this step; images/s counts the wait for data as well."""
        seconds = time.perf_counter() - self.started + self.data_seconds
        return {"time/step": seconds, "time/data": self.data_seconds, "images_per_second": batch_size / seconds}


def _timed(loader: Iterable[Batch | SourceBatch]) -> Iterator[tuple[Batch | SourceBatch, _StepClock]]:
    asked = time.perf_counter()
    for batch in loader:
        arrived = time.perf_counter()
        yield batch, _StepClock(arrived, arrived - asked)
        asked = time.perf_counter()


def _step_facts(values: StepValues, timings: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return what is logged beside the losses, under DINOv2's names where it has one."""
    facts = {
        "lr": values.lr,
        "wd": values.wd,
        "mom": values.momentum,
        "last_layer_lr": values.last_layer_lr,
        "teacher_temp": values.teacher_temp,
        "memory_mb": peak_memory_mb(device),
    }
    return facts | timings


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far in MiB: of the device on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
