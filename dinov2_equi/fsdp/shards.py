"""Tensors in files of which each rank writes its own, and their way back to any number of ranks.

A set of tensors is one file, ``model.safetensors``, or one for each rank, ``model-00001-of-00004.safetensors``. In the
header of such a part stands for each sharded tensor where its rows begin and how many there are in all parts; tensors
that are not sharded lie whole in the part of the main process.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinov2_equi.fsdp.manifest import TENSOR_SUFFIX, CheckpointError
from dinov2_equi.fsdp.sharding import (
    is_first_copy,
    is_sharded,
    local_part,
    rows_of_rank,
    sharded_like,
)

ROWS = "rows"
"""Key in the header of a part: JSON, by name of a sharded tensor its first row and the rows of all parts."""
_PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


def part_stem(name: str, rank: int, world_size: int) -> str:
    """Return the file name, without ending, of a rank's part of a set of tensors."""
    return f"{name}-{rank:05d}-of-{world_size:05d}"


def is_part_stem(stem: str) -> bool:
    """Return whether a file name stands for one of several parts."""
    return _PART_NAME.fullmatch(stem) is not None


@dataclass(frozen=True)
class Part:
    """What one rank writes of a set of tensors.

    Attributes:
        tensors: by name; whole ones, or rows.
        rows: for those that are rows, the first one and the number of all.
        is_shared: whether other ranks write parts of this set as well.
    """

    tensors: Mapping[str, Tensor]
    rows: Mapping[str, tuple[int, int]]
    is_shared: bool

    @property
    def metadata(self) -> dict[str, str]:
        """What goes into the header of the file."""
        return {ROWS: json.dumps({name: list(self.rows[name]) for name in sorted(self.rows)})}


def part_of_rank(tensors: Mapping[str, Tensor], *, is_main: bool) -> Part:
    """Return what this rank has to write: its rows of sharded tensors; the main process the other tensors too."""
    mine: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            if is_main:
                mine[name] = tensor
        elif is_first_copy(tensor):
            span = rows_of_rank(tensor)
            if len(span):
                mine[name] = local_part(tensor)
                rows[name] = (span.start, tensor.shape[0])
    return Part(mine, rows, is_shared=any(is_sharded(tensor) for tensor in tensors.values()))


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor, or all of it, in a file."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    total: int | None  # rows of all pieces; None: not cut

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a set, read from its files when they are asked for, on the CPU.

    Raises:
        CheckpointError: a part is missing, or the parts do not fit each other.
        SafetensorError: a file is none of tensors.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        pieces: dict[str, list[_Piece]] = {}
        for path in paths:
            for name, piece in _pieces_in(path):
                pieces.setdefault(name, []).append(piece)
        self._pieces = {name: sorted(parts, key=lambda piece: piece.start) for name, parts in pieces.items()}
        for name, parts in self._pieces.items():
            _check_cover(name, parts)

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor."""
        pieces = self._pieces[name]
        if pieces[0].total is None:
            return _read(pieces[0].path, name)
        return torch.cat([_read(piece.path, name) for piece in pieces])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, each file read once."""
        tensors = {}
        files = {piece.path for pieces in self._pieces.values() for piece in pieces}
        loaded = {path: load_file(path) for path in sorted(files)}
        for name, pieces in self._pieces.items():
            parts = [loaded[piece.path].pop(name) for piece in pieces]
            tensors[name] = parts[0] if pieces[0].total is None else torch.cat(parts)
        return tensors

    def rows(self, name: str, wanted: range) -> Tensor:
        """Return some rows of a tensor; nothing else is read."""
        found = []
        for piece in self._pieces[name]:
            start, stop = max(wanted.start, piece.start), min(wanted.stop, piece.stop)
            if start < stop:
                with safe_open(piece.path, framework="pt") as file:
                    found.append(file.get_slice(name)[start - piece.start : stop - piece.start])
        if not found:
            return self.layout[name].new_empty((0, *self.layout[name].shape[1:]), device="cpu")
        return found[0] if len(found) == 1 else torch.cat(found)

    @functools.cached_property
    def layout(self) -> dict[str, Tensor]:
        """Tensors of the meta device with the shapes and dtypes of those in the files."""
        return {
            name: torch.empty(_whole_shape(pieces), dtype=pieces[0].dtype, device="meta")
            for name, pieces in self._pieces.items()
        }


def _whole_shape(pieces: Sequence[_Piece]) -> tuple[int, ...]:
    first = pieces[0]
    return first.shape if first.total is None else (first.total, *first.shape[1:])


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _pieces_in(path: Path) -> Iterator[tuple[str, _Piece]]:
    with safe_open(path, framework="pt") as file:
        rows = _rows_in_header(file.metadata() or {}, path)
        names = list(file.keys())
        if not rows.keys() <= set(names):
            raise CheckpointError(f"{path.name} lacks tensors whose rows its header describes")
        for name in names:
            entry = file.get_slice(name)
            start, total = rows.get(name, (0, None))
            shape = tuple(entry.get_shape())
            if total is not None and not shape:
                raise CheckpointError(f"{path.name} holds rows of {name!r}, which has none")
            dtype = _DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path.name} holds numbers of the kind {entry.get_dtype()} in {name!r}")
            yield name, _Piece(path, start, shape, dtype, total)


_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def _rows_in_header(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[int, int]]:
    """Return first row and number of all rows by name, as `Part.metadata` writes them."""
    rows: Any = json.loads(metadata.get(ROWS, "{}"))
    is_sound = isinstance(rows, dict) and all(
        isinstance(span, list) and len(span) == 2 and all(type(number) is int and number >= 0 for number in span)
        for span in rows.values()
    )
    if not is_sound:
        raise CheckpointError(f"{path.name} has a header that describes no rows")
    return {name: (span[0], span[1]) for name, span in rows.items()}


def _check_cover(name: str, pieces: Sequence[_Piece]) -> None:
    """Raise CheckpointError unless the pieces of a tensor, in their order, are all of it, once."""
    first = pieces[0]
    if len(pieces) == 1 and first.total is None:
        return
    row = 0
    for piece in pieces:
        same = (piece.total, piece.dtype, piece.shape[1:]) == (first.total, first.dtype, first.shape[1:])
        if piece.total is None or not same or piece.start != row:
            raise CheckpointError(f"the parts of {name!r} do not fit: {piece.path.name} has rows from {piece.start}")
        row = piece.stop
    if row != first.total:
        raise CheckpointError(f"the parts of {name!r} hold {row} of {first.total} rows")


def group_parts(stems: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each set of tensors, by its name, in the order of the parts.

    Raises:
        CheckpointError: a part is missing.
    """
    sets: dict[str, list[str]] = {}
    for stem in sorted(stems):
        match = _PART_NAME.fullmatch(stem)
        sets.setdefault(match.group(1) if match else stem, []).append(stem)
    for name, found in sets.items():
        match = _PART_NAME.fullmatch(found[0])
        expected = [name] if match is None else [part_stem(name, rank, int(match[3])) for rank in range(int(match[3]))]
        if found != expected:
            missing = sorted(set(expected) - set(found))
            raise CheckpointError(f"the parts of {name} are not all there, or too many: {missing[:3]} are missing")
    return sets


def open_sets(directory: Path, stems: Sequence[str]) -> dict[str, SavedTensors]:
    """Return the sets of tensors in the files of a checkpoint, of which only the headers are read yet."""
    return {
        name: SavedTensors([directory / f"{stem}{TENSOR_SUFFIX}" for stem in parts])
        for name, parts in group_parts(stems).items()
    }


def layout_of(saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors of the same names, shapes and dtypes, without reading any."""
    return saved.layout if isinstance(saved, SavedTensors) else saved


def saved_like(own: Tensor, saved: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a copy of a saved tensor, on the CPU, sharded as `own` is: only the rows of this rank are read then.

    The result of a sharded one is on the device of `own`.
    """
    if not is_sharded(own):
        return saved[name].clone()
    rows = _saved_rows(own, saved, name).to(local_part(own).device, copy=True)
    return sharded_like(own, rows)


@torch.no_grad()
def copy_saved_(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same names, which may be sharded; names and shapes must be the same."""
    for name, tensor in own.items():
        local_part(tensor).copy_(_saved_rows(tensor, saved, name) if is_sharded(tensor) else saved[name])


def _saved_rows(own: Tensor, saved: Mapping[str, Tensor], name: str) -> Tensor:
    wanted = rows_of_rank(own)
    if isinstance(saved, SavedTensors):
        return saved.rows(name, wanted)
    return saved[name][wanted.start : wanted.stop]
