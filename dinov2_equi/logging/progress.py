"""How far the training is: a live display on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, track
from rich.text import Text

from dinov2_equi.logging.console import get_console, is_interactive

logger = logging.getLogger(__name__)

_PLAIN_INTERVAL_S = 5.0
_RATE_WINDOW_STEPS = 50
_TOTAL_LOSS = "total_loss"

Clock = Callable[[], float]
ItemT = TypeVar("ItemT")


def format_duration(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``, rounded down."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_losses(scalars: Mapping[str, Any]) -> str:
    """Return the loss terms among ``scalars`` in one line, the total first, with four significant digits.

    A loss term has ``loss`` in its name; ``dino_local_crops_loss`` is shown as ``dino_local``.
    """
    names = [name for name in scalars if "loss" in name]
    names.sort(key=lambda name: name != _TOTAL_LOSS)  # stable: the others keep their order
    return "  ".join(
        f"{name.removesuffix('_loss').removesuffix('_crops')} {float(scalars[name]):.4g}" for name in names
    )


class _StepRate:
    """Steps a second over the last steps, so that a slow start does not spoil the estimate."""

    def __init__(self, start_step: int, clock: Clock) -> None:
        self._clock = clock
        self._marks = deque([(clock(), start_step)], maxlen=_RATE_WINDOW_STEPS + 1)

    def mark(self, steps_done: int) -> None:
        """Note that ``steps_done`` steps are done by now."""
        self._marks.append((self._clock(), steps_done))

    def steps_per_second(self) -> float | None:
        """Return the rate, None before the first mark."""
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step <= first_step or last_time <= first_time:
            return None
        return (last_step - first_step) / (last_time - first_time)


class TrainingProgress(ABC):
    """Counts steps and knows the latest losses and the speed; made by ``training_progress``.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before this process took over.
        images_per_step: images of one step over all ranks; 0 shows steps/s instead of images/s.
        clock: returns seconds from any fixed start.
    """

    def __init__(self, total_steps: int, start_step: int, images_per_step: int, clock: Clock) -> None:
        self.total_steps = total_steps
        self.steps_done = start_step
        self._images_per_step = images_per_step
        self._losses = ""
        self._rate = _StepRate(start_step, clock)

    def update(self, steps_done: int, scalars: Mapping[str, Any] | None = None) -> None:
        """Say how many steps of the run are done.

        Args:
            steps_done: 1 after the first step of the run, ``total_steps`` after the last.
            scalars: numbers or tensors of one element by name, of which the loss terms are shown; None keeps those
                shown before.
        """
        self.steps_done = steps_done
        self._rate.mark(steps_done)
        if scalars is not None:
            self._losses = format_losses(scalars)
        self._show()

    @abstractmethod
    def close(self) -> None:
        """Show the last state; called once, at the end."""

    @abstractmethod
    def _show(self) -> None:
        """Show the present state, if it is time to."""

    def _speed(self) -> str:
        """Return images (or steps) a second and the time left, empty before the first step."""
        rate = self._rate.steps_per_second()
        if rate is None:
            return ""
        speed = f"{rate * self._images_per_step:.1f} images/s" if self._images_per_step else f"{rate:.2f} steps/s"
        return f"{speed}  ETA {format_duration((self.total_steps - self.steps_done) / rate)}"


class PlainProgress(TrainingProgress):
    """Logs one line every few seconds and one at the end."""

    def __init__(self, total_steps: int, start_step: int, images_per_step: int, clock: Clock) -> None:
        super().__init__(total_steps, start_step, images_per_step, clock)
        self._clock = clock
        self._shown_at = clock()
        self._shown_steps = start_step

    def close(self) -> None:
        """Log the last state, unless that was done."""
        if self.steps_done > self._shown_steps:
            self._log_line()

    def _show(self) -> None:
        if self._clock() - self._shown_at >= _PLAIN_INTERVAL_S:
            self._log_line()

    def _log_line(self) -> None:
        self._shown_at, self._shown_steps = self._clock(), self.steps_done
        parts = [f"step {self.steps_done}/{self.total_steps}", self._losses, self._speed()]
        logger.info("%s", "  ".join(part for part in parts if part))


class _BarAndLosses(Progress):
    """A progress bar with a second line for the losses."""

    second_line = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar, then the losses."""
        yield from super().get_renderables()
        yield Text(self.second_line, style="dim")


class LiveProgress(TrainingProgress):
    """Draws a bar that stays below the log lines."""

    def __init__(self, console: Console, total_steps: int, start_step: int, images_per_step: int, clock: Clock) -> None:
        super().__init__(total_steps, start_step, images_per_step, clock)
        self._bar = _BarAndLosses(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, speed="")
        self._bar.start()

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        self._bar.stop()

    def _show(self) -> None:
        self._bar.second_line = self._losses
        self._bar.update(self._task, completed=self.steps_done, speed=self._speed())


@contextmanager
def training_progress(
    total_steps: int,
    start_step: int = 0,
    *,
    images_per_step: int = 0,
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[TrainingProgress]:
    """Show the progress of a run while the block lasts; call ``update(steps_done, scalars)`` on what it gives.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before, by the run that is resumed.
        images_per_step: images of one step over all ranks, to show images/s; 0 shows steps/s.
        console: where to draw; None for the console that the log lines go to.
        clock: returns seconds from any fixed start.
    """
    console = console or get_console()
    progress: TrainingProgress
    if is_interactive(console):
        progress = LiveProgress(console, total_steps, start_step, images_per_step, clock)
    else:
        progress = PlainProgress(total_steps, start_step, images_per_step, clock)
    try:
        yield progress
    finally:
        progress.close()


@contextmanager
def counting(what: str, description: str) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many of something were found so far, for as long as the block lasts.

    Args:
        what: What is counted, such as `images`.
        description: What is being done.

    Yields:
        A function that takes how many more there are.
    """
    console = get_console()
    columns = (TextColumn("{task.description}"), TextColumn(f"{{task.completed:,.0f}} {what}"))
    with Progress(*columns, console=console, transient=True, disable=not is_interactive(console)) as progress:
        task = progress.add_task(description, total=None)
        yield lambda count: progress.advance(task, count)


def tracked(items: Sequence[ItemT], description: str) -> Iterator[ItemT]:
    """Yield the items; on a terminal, and only there, a bar shows how many are done."""
    console = get_console()
    yield from track(items, description, console=console, transient=True, disable=not is_interactive(console))
