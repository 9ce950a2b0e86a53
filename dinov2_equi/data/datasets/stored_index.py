"""Indices of data sets, written once and memory-mapped from then on: arrays in a folder of their own, no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

INDEX_FOLDER = ".dinov2_equi_index"
STORED_FROM = 10_000
"""Images from which a search is worth being stored; fewer are found in well under a second."""

Arrays = Mapping[str, npt.NDArray[Any]]
"""What an index consists of, by name."""


def index_places(identity: object, beside: Path | None = None) -> list[Path]:
    """Return the folders where the index of something may lie, the first choice first.

    Args:
        identity: What tells it apart, anything that JSON can hold: with another identity it is another index.
        beside: A folder in which `.dinov2_equi_index` is looked for and made; None: only in the user's cache
            (`$XDG_CACHE_HOME` or `~/.cache`).
    """
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinov2_equi" / "index"
    return [*([beside / INDEX_FOLDER / name] if beside is not None else []), cache / name]


def load_index(
    places: Sequence[Path], names: Sequence[str], is_sound: Callable[[Arrays], bool]
) -> dict[str, npt.NDArray[Any]] | None:
    """Return the arrays of these names from the first place that holds them, memory-mapped, or None.

    Args:
        places: See `index_places`.
        names: Of the arrays.
        is_sound: Whether arrays fit each other and what they describe; if not, they are to be made anew.
    """
    for place in places:
        if place.is_dir():
            try:
                arrays = _load(place, names)
                if is_sound(arrays):
                    return arrays
                logger.info("the index %s is out of date and is written anew", place)
            except (OSError, ValueError) as error:
                logger.warning("the index %s cannot be read (%s) and is written anew", place, error)
    return None


def store_index(places: Sequence[Path], arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Write arrays to the first place that can be written to; return them memory-mapped from there.

    Where no place can be written to, they are returned as they are, and a warning says so.
    """
    for place in places:
        try:
            _save(arrays, place)
            return _load(place, list(arrays))
        except OSError as error:
            logger.debug("the index cannot be written to %s: %s", place, error)
    logger.warning(
        "no folder for the index can be written to (%s); it is made at each start", ", ".join(map(str, places))
    )
    return dict(arrays)


def _load(place: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}


def _save(arrays: Arrays, place: Path) -> None:
    """Write an index under a temporary name and rename it: it is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    pending, old = (place.with_name(f".{place.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    for left_behind in (pending, old):
        shutil.rmtree(left_behind, ignore_errors=True)
    pending.mkdir()
    try:
        for name, values in arrays.items():
            with (pending / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        if place.is_dir():  # out of date, or another process was faster
            place.rename(old)
        pending.rename(place)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
