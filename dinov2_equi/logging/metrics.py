"""Training metrics on disk: JSON lines that survive a kill and a resume, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS_NAME = "training_metrics.json"
EVALUATION_NAME = "evaluation_metrics.json"
PICTURES_NAME = "pictures"
TENSORBOARD_NAME = "tensorboard"
_STEP_KEY = "iteration"


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Return the lines of a metrics file in order, each a mapping with ``iteration`` and the written scalars.

    A value that was not finite comes back as NaN. A last line without its line break, cut off by a kill, is left out.

    Raises:
        ValueError: another line is not a JSON object with an ``iteration``; the message names its number.
        FileNotFoundError: there is no such file.
    """
    return [_parse_line(path, number, line) for number, line in enumerate(_complete_lines(path), start=1)]


def _complete_lines(path: Path | str) -> list[str]:
    """Return the lines of ``path`` that end in a line break, without it."""
    complete, _, _ = Path(path).read_text(encoding="utf-8", errors="replace").rpartition("\n")
    return complete.split("\n") if complete else []


def _parse_line(path: Path | str, number: int, line: str) -> dict[str, float]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON ({error}); remove that line") from error
    if not isinstance(content, dict) or not isinstance(content.get(_STEP_KEY), int):
        raise ValueError(f"line {number} of {path} has no {_STEP_KEY!r}; remove that line")
    return {key: math.nan if value is None else value for key, value in content.items()}


def _format_line(step: int, scalars: Mapping[str, Any]) -> str:
    """Return one line of the file; JSON has no NaN and no infinity, both become null."""
    values = {key: float(value) for key, value in scalars.items()}
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps({_STEP_KEY: step, **finite}, allow_nan=False) + "\n"


def _truncate(path: Path, start_step: int) -> None:
    """Drop all lines from ``start_step`` on, through a new file that replaces the old one at once."""
    if not path.exists():
        return
    lines = _complete_lines(path)
    steps = [line[_STEP_KEY] for line in read_metrics(path)]
    kept = [line for line, step in zip(lines, steps, strict=True) if step < start_step]
    if len(kept) < len(lines):
        logger.info(
            "dropping %d lines of %s from step %d on, to be done again", len(lines) - len(kept), path, start_step
        )
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _open_tensorboard(directory: Path, start_step: int | None) -> SummaryWriter | None:
    """Return a writer that hides what is there from ``start_step`` on, where given; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.info("TensorBoard is not installed (%s); metrics go to %s only", error, METRICS_NAME)
        return None
    return SummaryWriter(str(directory), purge_step=start_step)


def _append_evaluation(output_dir: Path, step: int, scalars: Mapping[str, Any]) -> None:
    with (output_dir / EVALUATION_NAME).open("a", encoding="utf-8", newline="\n") as file:
        file.write(_format_line(step, scalars))


class EvaluationWriter:
    """Writes evaluations of a run from a process beside its training, whose files stay as they are.

    Args:
        output_dir: the run's folder.
        tensorboard: also write event files under ``tensorboard/evaluation/``, if that package is installed.
    """

    def __init__(self, output_dir: Path, tensorboard: bool = False) -> None:
        self._output_dir = output_dir
        folder = output_dir / TENSORBOARD_NAME / "evaluation"
        self._tensorboard = _open_tensorboard(folder, None) if tensorboard else None

    def write_evaluation(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line to the file of evaluations; see `MetricWriter.write`."""
        _append_evaluation(self._output_dir, step, scalars)
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, float(value), step)

    def __enter__(self) -> EvaluationWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close the event file."""
        if self._tensorboard is not None:
            self._tensorboard.close()


class MetricWriter:
    """Writes scalars and pictures of a run; to be made by the main process only. Closes itself as a context manager.

    ``training_metrics.json`` holds one JSON object a line, each flushed as it is written; ``evaluation_metrics.json``
    does the same for what is measured now and then. On construction the lines from ``start_step`` on are dropped, so
    that a resumed (or restarted) run holds each step once.

    Args:
        output_dir: the run's folder, made if missing.
        tensorboard: also write event files under ``tensorboard/``, if that package is installed.
        start_step: the first step of this run, 0 for a fresh one.

    Raises:
        ValueError: an existing metrics file holds a line that cannot be read.
    """

    def __init__(self, output_dir: Path | str, tensorboard: bool = False, start_step: int = 0) -> None:
        self._output_dir = Path(output_dir)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / METRICS_NAME
        for name in (METRICS_NAME, EVALUATION_NAME):
            _truncate(self._output_dir / name, start_step)
        self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")
        self._tensorboard = _open_tensorboard(self._output_dir / TENSORBOARD_NAME, start_step) if tensorboard else None

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line with ``iteration`` = ``step`` and the scalars: numbers or tensors of one element."""
        self._file.write(_format_line(step, scalars))
        self._file.flush()
        self._add_scalars(step, scalars)

    def write_evaluation(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line to the file of evaluations; as `write`."""
        _append_evaluation(self._output_dir, step, scalars)
        self._add_scalars(step, scalars)

    def _add_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, float(value), step)

    def write_image(self, step: int, name: str, image: NDArray[np.uint8]) -> Path:
        """Write a picture to ``pictures/<name>_<step>.png`` (and TensorBoard) and return the path.

        Args:
            step: step the picture belongs to.
            name: letters, digits, ``_`` and ``-``; a ``/`` becomes ``_`` in the file name.
            image: [H, W, 3] uint8.

        Raises:
            ValueError: the array is not [H, W, 3] uint8.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"expected a picture [H, W, 3] of uint8, got {image.shape} of {image.dtype}")
        from PIL import Image

        path = self._output_dir / PICTURES_NAME / f"{name.replace('/', '_')}_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush and close all files; further calls do nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> MetricWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the writer."""
        self.close()
