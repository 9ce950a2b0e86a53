"""The manifest of a checkpoint: which files belong to it, their sizes and their SHA-256.

The text of a manifest has exactly one valid form, so that any change of it, down to a space, is detected.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSOR_SUFFIX = ".safetensors"
MAX_JSON_BYTES = 64 << 20
"""No JSON file of a checkpoint is larger; it is read as a whole. That of a run has some ten thousand bytes."""

_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH_CHUNK_BYTES = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or trusted; the message says which, why and what to do."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and its files by name, without the manifest itself."""

    step: int
    files: Mapping[str, FileEntry]

    def to_text(self) -> str:
        """Return the one valid text of this manifest."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        return json.dumps({"format_version": FORMAT_VERSION, "step": self.step, "files": files}, indent=1) + "\n"


def is_tensor_stem(stem: str) -> bool:
    """Return whether ``stem`` may name a file of tensors: letters, digits, ``_`` and ``-``, never a path."""
    return _STEM.fullmatch(stem) is not None


def describe_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of the regular file ``path``, read in chunks.

    Raises:
        CheckpointError: ``path`` is a link, a pipe or anything else but a plain file.
        OSError: it does not exist or cannot be read.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"expected {path.name} to be a plain file, found a link, folder or device")
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size=size, sha256=digest.hexdigest())


def check_json_size(name: str, size: int) -> None:
    """Raise CheckpointError for a JSON file of more than `MAX_JSON_BYTES`."""
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} has {size} bytes, a checkpoint's has at most {MAX_JSON_BYTES}")


def _parse_entry(name: str, entry: Any) -> FileEntry:
    """Return the checked entry of file ``name``."""
    if name != STATE_NAME and not (name.endswith(TENSOR_SUFFIX) and is_tensor_stem(name[: -len(TENSOR_SUFFIX)])):
        raise CheckpointError(f"{MANIFEST_NAME} names {name!r}, which is not a file of a checkpoint")
    if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
        raise CheckpointError(f"{MANIFEST_NAME} holds no size for {name!r}")
    sha256 = entry.get("sha256")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise CheckpointError(f"{MANIFEST_NAME} holds no SHA-256 for {name!r}")
    return FileEntry(size=entry["size"], sha256=sha256)


def parse_manifest(text: str) -> Manifest:
    """Return the manifest that ``text`` holds.

    Raises:
        CheckpointError: the text is not exactly what ``Manifest.to_text`` writes, or is of another format version.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{MANIFEST_NAME} is not a JSON object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME} has format version {version!r}, this code reads {FORMAT_VERSION}: either the file is "
            "damaged or the checkpoint was written by another version of this package"
        )
    step, files = content.get("step"), content.get("files")
    if not isinstance(step, int) or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST_NAME} holds no step or no files")
    manifest = Manifest(step=step, files={name: _parse_entry(name, entry) for name, entry in files.items()})
    if STATE_NAME not in manifest.files or manifest.to_text() != text:
        raise CheckpointError(f"{MANIFEST_NAME} was changed after it was written")
    return manifest


def read_verified_manifest(directory: Path, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Return the manifest of the checkpoint in ``directory`` after checking every file against it.

    Args:
        directory: the checkpoint.
        share: (r, n): of n ranks that check together, each checks ``state.json`` and every n-th file from its r-th on.

    Raises:
        CheckpointError: the manifest or a file is missing, unreadable or differs from what was written.
    """
    try:
        check_json_size(MANIFEST_NAME, (directory / MANIFEST_NAME).lstat().st_size)
        describe_file(directory / MANIFEST_NAME)
        manifest = parse_manifest((directory / MANIFEST_NAME).read_bytes().decode())
        check_json_size(STATE_NAME, manifest.files[STATE_NAME].size)
        rank, size = share
        for index, (name, expected) in enumerate(sorted(manifest.files.items())):
            if name == STATE_NAME or index % size == rank:
                _check_file(directory / name, expected)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from error
    return manifest


def _check_file(path: Path, expected: FileEntry) -> None:
    """Raise CheckpointError unless ``path`` is the file that was written."""
    found = describe_file(path)
    if found.size != expected.size:
        raise CheckpointError(f"{path.name} has {found.size} bytes, {expected.size} were written")
    if found.sha256 != expected.sha256:
        raise CheckpointError(f"{path.name} has SHA-256 {found.sha256}, written was {expected.sha256}")
