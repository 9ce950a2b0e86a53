"""Checkpoints that survive a crash at any moment, notice damage and hold no pickle.

A checkpoint is a directory ``step_00000100`` with one ``.safetensors`` file for each set of tensors, or one for each
rank where they are sharded, ``state.json`` for everything else and ``manifest.json`` with the SHA-256 of all. It is
written under a name that is never taken for a checkpoint, flushed to the disk, and renamed; only then are older ones
removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_equi.distributed.env import is_main_process
from dinov2_equi.distributed.rank_group import RankGroup
from dinov2_equi.fsdp.background import BackgroundJob, CpuCopies
from dinov2_equi.fsdp.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    TENSOR_SUFFIX,
    CheckpointError,
    FileEntry,
    Manifest,
    check_json_size,
    describe_file,
    is_tensor_stem,
    read_verified_manifest,
)
from dinov2_equi.fsdp.shards import (
    Part,
    is_part_stem,
    layout_of,
    open_sets,
    part_of_rank,
    part_stem,
    saved_like,
)

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_([0-9]{8,})")
# Names that _STEP_NAME never matches: being written, on the way out, set aside while a successor moves in.
_PARTIAL_PREFIX = ".partial-"
_PRUNED_PREFIX = ".pruned-"
_REPLACED_PREFIX = ".replaced-"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        step: the step it was saved at.
        tensors: CPU tensors by name, in one mapping for each name given to ``save``. With several ranks they are read
            from their files when they are asked for.
        state: the JSON values given to ``save`` (tuples come back as lists).
        path: the directory it was read from.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    path: Path


class CheckpointStore:
    """The checkpoints of one run, in one directory.

    A crash or a full disk during ``save`` leaves the earlier checkpoints as they were. What a crash left behind is
    cleared when the next store is opened on the directory. One run at a time may write to a directory.

    Args:
        directory: where the checkpoints lie; made if missing.
        keep: how many checkpoints stay, the newest ones; at least 1.
        read_only: only look: make, clear and save nothing. For tools that read a directory while a run writes to it.
        ranks: the ranks that save and load together: every one calls ``save`` and ``load``, and all succeed, fail or
            fall back to the same earlier checkpoint. None: one process does it alone, the main one.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(
        self, directory: Path | str, keep: int = 3, *, read_only: bool = False, ranks: RankGroup | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"expected to keep at least 1 checkpoint, got {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self.read_only = read_only
        self._ranks = ranks
        self._job: BackgroundJob | None = None
        self._copies = CpuCopies()
        if not read_only and is_main_process():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in the directory, ascending; they are not verified."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP_NAME.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        steps = {int(match.group(1)) for match in matches if match is not None}
        return sorted(step for step in steps if self._path(step).is_dir())

    def latest_step(self) -> int | None:
        """Return the newest step in the directory, or None; not verified, ``load`` may have to go further back."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        in_background: bool = False,
    ) -> Path:
        """Write a checkpoint, remove those beyond ``keep`` and return the new directory.

        A checkpoint of the same step is replaced. Each rank writes its rows of sharded tensors to a file of its own,
        the main process all else; nothing is gathered.

        Args:
            step: number of the step, at least 0.
            tensors: sets of tensors by file name without its ending, for example ``{"student": {...}}``; any device
                and dtype, stored as they are.
            state: everything else, as JSON values with string keys.
            in_background: return once the tensors are copied; a thread writes the copies. The checkpoint is there after
                ``wait``, which also every next call of ``save`` or ``load`` begins with: one at most is on its way.

        Raises:
            ValueError: ``step`` is negative or a name is not a plain file name.
            TypeError: ``state`` holds something that JSON cannot.
            CheckpointError: the checkpoint, or the one before it in the background, could not be written, or ``state``
                is too large to be read again; earlier ones are untouched.
        """
        self.wait()
        if self.read_only:
            raise CheckpointError(f"the store of {self.directory} was opened read-only; open it without read_only")
        _check_names(step, tensors)
        state_text = json.dumps(state, indent=1) + "\n"
        check_json_size(STATE_NAME, len(state_text.encode()))
        parts = {name: part_of_rank(values, is_main=self._is_main) for name, values in tensors.items()}
        if in_background:
            parts = {name: self._copied(name, part) for name, part in parts.items()}
            self._job = BackgroundJob(lambda: self._write(step, parts, state_text))
        else:
            self._write(step, parts, state_text)
        return self._path(step)

    def _copied(self, name: str, part: Part) -> Part:
        return replace(part, tensors=self._copies.copy(name, part.tensors))

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has ended in an error that nobody has been told of yet.

        Ranks may learn of it at different times; where one has, all should call ``wait``.
        """
        return self._job is not None and self._job.has_failed

    def wait(self) -> None:
        """Return once nothing is being written in the background.

        Raises:
            CheckpointError: what was being written could not be; once, and on all ranks.
        """
        job, self._job = self._job, None
        if job is not None:
            job.wait()

    @contextlib.contextmanager
    def waiting_at_the_end(self) -> Iterator[None]:
        """Wait for the background when the block ends, however it ends; its own error comes first."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except CheckpointError as error:
                logger.error("%s", error)
            raise
        self.wait()

    @property
    def _is_main(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def _write(self, step: int, parts: Mapping[str, Part], state_text: str) -> None:
        target = self._path(step)
        partial = self.directory / f"{_PARTIAL_PREFIX}{target.name}"
        try:
            self._together(lambda: _make_anew(partial), only_main=True)
            files = self._gathered(self._together(lambda: self._write_parts(partial, parts)))
            self._together(lambda: self._finish(partial, target, Manifest(step, files), state_text), only_main=True)
        except (OSError, SafetensorError) as error:
            if self._is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {error}. Earlier "
                "checkpoints are untouched; make room or choose another output directory and resume"
            ) from error
        if not self._is_main:
            return
        try:
            self._prune(step)
        except OSError as error:
            logger.warning("an old checkpoint in %s could not be removed: %s", self.directory, error)

    def _together(self, action: Callable[[], _Result], *, only_main: bool = False) -> _Result | None:
        """Run an action on every rank, or on the main one; where it fails on one of them, raise on all.

        Raises:
            OSError: on all ranks.
        """
        if self._ranks is None:
            return action()
        result, problem = None, ""
        if self._is_main or not only_main:
            try:
                result = action()
            except Exception as error:  # whatever it is, the others must not wait for this rank
                problem = f"{type(error).__name__}: {error}"
        problems = self._ranks.gather_texts(problem)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        if failed:
            raise OSError("; ".join(failed))
        return result

    def _write_parts(self, partial: Path, parts: Mapping[str, Part]) -> dict[str, FileEntry]:
        """Write the files of this rank and flush them; return their entries in the manifest."""
        entries = {}
        for name, part in parts.items():
            if not part.is_shared and not self._is_main:
                continue
            if part.is_shared:
                assert self._ranks is not None, "sharded tensors are saved by all ranks together"
                path = partial / f"{part_stem(name, self._ranks.rank, self._ranks.size)}{TENSOR_SUFFIX}"
                save_file(_storable(part.tensors), path, metadata=part.metadata)
            else:
                path = partial / f"{name}{TENSOR_SUFFIX}"
                save_file(_storable(part.tensors), path)
            _sync_file(path)
            entries[path.name] = path
        return {name: describe_file(path) for name, path in entries.items()}

    def _gathered(self, mine: dict[str, FileEntry] | None) -> dict[str, FileEntry]:
        """Return the entries of the files of all ranks."""
        assert mine is not None
        if self._ranks is None:
            return mine
        texts = self._ranks.gather_texts(json.dumps({name: [e.size, e.sha256] for name, e in mine.items()}))
        return {name: FileEntry(*entry) for text in texts for name, entry in json.loads(text).items()}

    def _finish(self, partial: Path, target: Path, manifest: Manifest, state_text: str) -> None:
        """Complete the directory that all ranks have written to, and give it its name."""
        _write_text(partial / STATE_NAME, state_text)
        files = {**manifest.files, STATE_NAME: describe_file(partial / STATE_NAME)}
        _write_text(partial / MANIFEST_NAME, Manifest(manifest.step, files).to_text())
        _sync_directory(partial)
        self._publish(partial, target)

    def load(self, step: int | None = None) -> Checkpoint:
        """Return the checkpoint of ``step``, or the newest one that is undamaged; all tensors on the CPU.

        Args:
            step: the step to load, without any fallback. None: the newest; each damaged one is named in a warning
                and passed over, by all ranks alike.

        Raises:
            CheckpointError: there is none, the one asked for is missing or damaged, or all are damaged.
        """
        self.wait()
        steps = self._agreed_steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are: {steps}")
            return self._read(step)
        problems: list[str] = []
        for candidate in reversed(steps):
            try:
                return self._read(candidate)
            except CheckpointError as error:
                problems.append(str(error))
                logger.warning("%s; trying the checkpoint before it", error)
        if problems:
            raise CheckpointError(f"no usable checkpoint in {self.directory}: " + "; ".join(problems))
        raise CheckpointError(f"no checkpoint in {self.directory}")

    def _agreed_steps(self) -> list[int]:
        """Return `steps` as the main process sees them."""
        if self._ranks is None:
            return self.steps()
        seen: list[int] = json.loads(self._ranks.gather_texts(json.dumps(self.steps()))[0])
        return seen

    def _read(self, step: int) -> Checkpoint:
        """Read a checkpoint; each of several ranks verifies some of its files, and all refuse it where one does."""
        path = self._path(step)
        if self._ranks is None:
            return read_checkpoint(path)
        found, problem = None, ""
        try:
            found = _open(path, share=(self._ranks.rank, self._ranks.size))
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in self._ranks.gather_texts(problem) if text]
        if found is None or problems:
            raise CheckpointError("; ".join(dict.fromkeys(problems)))
        return found

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _publish(self, partial: Path, target: Path) -> None:
        """Give the complete directory ``partial`` its name; an older ``target`` is never gone before the new one."""
        replaced = self.directory / f"{_REPLACED_PREFIX}{target.name}"
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        _sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, saved_step: int) -> None:
        """Remove the oldest checkpoints beyond ``keep``; never the one just saved, nor any of a later step."""
        steps = self.steps()
        newer = [step for step in steps if step > saved_step]
        if newer:
            logger.warning(
                "%s holds checkpoints of later steps %s than the one just saved (%d): a resume would prefer them; "
                "remove them if the run was taken back on purpose",
                self.directory,
                newer,
                saved_step,
            )
        for step in [step for step in steps if step <= saved_step][: -self.keep]:
            path = self._path(step)
            pruned = self.directory / f"{_PRUNED_PREFIX}{path.name}"
            # Renamed first: a crash half-way through the removal must not leave half a checkpoint.
            path.rename(pruned)
            shutil.rmtree(pruned)

    def _clear_leftovers(self) -> None:
        """Remove what a crash left behind, and put back a checkpoint whose replacement did not arrive."""
        for path in sorted(self.directory.glob(f"{_REPLACED_PREFIX}*")):
            target = self.directory / path.name.removeprefix(_REPLACED_PREFIX)
            if not target.exists() and _is_intact(path):
                path.rename(target)
        for prefix in (_PARTIAL_PREFIX, _PRUNED_PREFIX, _REPLACED_PREFIX):
            for path in self.directory.glob(f"{prefix}*"):
                logger.info("removing %s, left behind by an interrupted run", path)
                shutil.rmtree(path, ignore_errors=True)


def _is_intact(path: Path) -> bool:
    try:
        read_verified_manifest(path)
    except CheckpointError:
        return False
    return True


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Return the checkpoint in the directory ``path`` after verifying all its files; tensors on the CPU.

    Raises:
        CheckpointError: it is missing or damaged; the message names the file and what is wrong with it.
    """
    path = Path(path)
    with _damage_of(path):
        manifest = read_verified_manifest(path)
        _check_step(path, manifest)
        stems = _tensor_stems(manifest)
        if any(is_part_stem(stem) for stem in stems):
            tensors = {name: saved.read() for name, saved in open_sets(path, stems).items()}
        else:
            tensors = {stem: load_file(path / f"{stem}{TENSOR_SUFFIX}") for stem in stems}
        return Checkpoint(step=manifest.step, tensors=tensors, state=_read_state(path), path=path)


def _open(path: Path, share: tuple[int, int]) -> Checkpoint:
    """Return a checkpoint whose tensors are read when they are asked for.

    Args:
        path: its directory.
        share: which of the files to verify, (r, n): every n-th from the r-th on.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with _damage_of(path):
        manifest = read_verified_manifest(path, share)
        _check_step(path, manifest)
        return Checkpoint(manifest.step, open_sets(path, _tensor_stems(manifest)), _read_state(path), path)


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn whatever reading a spoiled file ends in into a CheckpointError that names the checkpoint."""
    try:
        yield
    except (CheckpointError, OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _check_step(path: Path, manifest: Manifest) -> None:
    match = _STEP_NAME.fullmatch(path.name)
    if match is not None and int(match.group(1)) != manifest.step:
        raise CheckpointError(f"{MANIFEST_NAME} is of step {manifest.step}")


def _tensor_stems(manifest: Manifest) -> list[str]:
    return [name.removesuffix(TENSOR_SUFFIX) for name in manifest.files if name.endswith(TENSOR_SUFFIX)]


def _read_state(path: Path) -> dict[str, Any]:
    state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE_NAME} is not a JSON object")
    return state


def _check_names(step: int, names: Iterable[str]) -> None:
    """Raise ValueError for a step or a file name that cannot be part of a checkpoint."""
    if step < 0:
        raise ValueError(f"expected a step >= 0, got {step}")
    for name in names:
        if not is_tensor_stem(name) or is_part_stem(name):
            raise ValueError(
                f"expected each set of tensors to have a name of letters, digits, '_' and '-' without a file ending, "
                f"and not that of a part, got {name!r}"
            )


def _make_anew(directory: Path) -> None:
    """Make an empty directory in place of whatever is there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def _storable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as the file format demands."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in values.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Flush the names in ``path`` to the disk, where the system has a way to say so."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bits of ``tensors``, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, frozenset[str]]]:
    """Return each parameter of an AdamW by name, with the keys of its state once it has one."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise TypeError(f"expected a torch.optim.AdamW, got {type(optimizer).__name__}")
    named: dict[str, tuple[Tensor, frozenset[str]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        names, params = group.get("names"), group["params"]
        if names is None or len(names) != len(params):
            raise ValueError(f"expected parameter group {index} to hold the 'names' of its {len(params)} parameters")
        keys = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
        named.update({name: (param, frozenset(keys)) for name, param in zip(names, params, strict=True)})
    return named


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an AdamW as tensors named ``<state key>/<parameter name>`` and JSON values, for ``save``.

    The hyper-parameters are not part of it: they come from the configuration and the schedules.

    Args:
        optimizer: its groups hold ``names`` beside ``params``, as ``build_param_groups`` makes them.

    Raises:
        TypeError: it is not an AdamW.
        ValueError: a group lacks ``names``.
    """
    tensors: dict[str, Tensor] = {}
    without_state: list[str] = []
    named = _named_parameters(optimizer)
    for name, (param, keys) in named.items():
        values = optimizer.state.get(param, {})
        if not values:
            without_state.append(name)
        tensors.update({f"{key}/{name}": values[key] for key in sorted(keys) if values})
    return tensors, {"class": "AdamW", "names": sorted(named), "without_state": sorted(without_state)}


def restore_optimizer_(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put what ``flatten_optimizer`` returned back into an AdamW over parameters of the same names and shapes.

    The grouping may differ; learning rates and the other hyper-parameters stay as they are. The tensors are copied.

    Raises:
        TypeError: it is not an AdamW.
        ValueError: names, shapes or dtypes differ from the optimiser's; it is unchanged then.
    """
    named = _named_parameters(optimizer)
    for key in ("names", "without_state"):
        names = state.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"expected a list of names as {key!r} of the optimiser, the checkpoint holds {names!r:.80}"
            )
    _check_same("optimiser class", {"AdamW"}, {str(state.get("class"))})
    _check_same("parameters of the optimiser", named.keys(), state.get("names", ()))
    without_state = set(state.get("without_state", ()))
    expected = {f"{key}/{name}" for name, (_, keys) in named.items() if name not in without_state for key in keys}
    _check_same("tensors of the optimiser", expected, tensors)
    layout = layout_of(tensors)
    for name, (param, _) in named.items():
        _check_state_tensors(name, param, layout)
    packed = optimizer.state_dict()
    restored = {
        index: {key: _state_like(param, tensors, key, name) for key in sorted(keys)}
        for index, (name, (param, keys)) in enumerate(named.items())
        if name not in without_state
    }
    optimizer.load_state_dict({"state": restored, "param_groups": packed["param_groups"]})


def _state_like(param: Tensor, tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    """Return a copy of a state of a parameter; all but the count of its steps is sharded where the parameter is."""
    saved = f"{key}/{name}"
    return tensors[saved].clone() if key == "step" else saved_like(param, tensors, saved)


def _check_same(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise ValueError unless both hold the same names."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"the {what} differ from the checkpoint: {len(missing)} missing in the checkpoint {missing[:5]}, "
            f"{len(unexpected)} unknown here {unexpected[:5]}; resume with the configuration that wrote it"
        )


def _check_state_tensors(name: str, param: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the saved state of parameter ``name`` has the parameter's shape and dtype.

    Another dtype would be converted without a word, and the resume would not be exact.
    """
    for key, shape in (
        ("step", ()),
        ("exp_avg", param.shape),
        ("exp_avg_sq", param.shape),
        ("max_exp_avg_sq", param.shape),
    ):
        value = tensors.get(f"{key}/{name}")
        dtype = torch.get_default_dtype() if key == "step" else param.dtype
        if value is not None and value.dtype != dtype:
            raise ValueError(f"expected {dtype} for {key} of {name!r}, the checkpoint holds {value.dtype}")
        if value is not None and value.shape != shape:
            raise ValueError(
                f"expected shape {tuple(shape)} for {key} of {name!r}, the checkpoint holds {tuple(value.shape)}; "
                "resume with the configuration that wrote it"
            )
