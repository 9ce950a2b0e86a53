"""The folder of a run: what may lie there, and moving an earlier run out of the way."""

from __future__ import annotations

import itertools
from pathlib import Path

SET_ASIDE = "set_aside"
RUN_ENTRIES = (
    "bad_images.jsonl",
    "best",
    "checkpoints",
    "config.yaml",
    "equi_branch.safetensors",
    "eval",
    "evaluation_metrics.json",
    "knn.json",
    "logs",
    "pictures",
    "replay",
    "report.html",
    "results.json",
    "teacher_backbone.safetensors",
    "teacher_checkpoint.pth",
    "tensorboard",
    "training_metrics.json",
)
"""What a run writes, but for the code and logs of its SLURM jobs, which may still run. The folder may hold other
things: they are not ours to move."""
_RUN_MARKS = ("checkpoints", "training_metrics.json")


def check_run_folder(folder: Path, *, must_exist: bool) -> None:
    """Make sure that a run can live in `folder`, or lives there already where it must.

    Raises:
        ValueError: if a file is in the way, or there is no run to look at.
    """
    blocking = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not blocking.is_dir():
        raise ValueError(f"--output-dir must be a folder, but {blocking} is a file; choose another --output-dir")
    if must_exist and not (folder / "checkpoints").is_dir():
        raise ValueError(f"--eval-only found no run in {folder}: no checkpoints/; check --output-dir, or train first")


def holds_run(folder: Path) -> bool:
    """Return whether an earlier run left anything to go on from or to keep in `folder`."""
    return any((folder / mark).exists() for mark in _RUN_MARKS)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run into `set_aside/1`, `set_aside/2`, ... of its folder; nothing is deleted.

    Returns:
        Where it went, or None if there was no run.
    """
    if not holds_run(folder):
        return None
    numbers = itertools.count(1)
    target = next(path for number in numbers if not (path := folder / SET_ASIDE / str(number)).exists())
    target.mkdir(parents=True)
    for name in RUN_ENTRIES:
        if (folder / name).exists():
            (folder / name).rename(target / name)
    return target
