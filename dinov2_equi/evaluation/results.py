"""One file format for every measured number: results.json."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1
_GIT_TIMEOUT_SECONDS = 5.0


def write_results(
    path: Path,
    numbers: Mapping[str, Any],
    *,
    task: str,
    seed: int | None = None,
    config_text: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `numbers` with their provenance as JSON and return the path.

    The file is written beside its place and renamed, so that a reader never sees half of it. Fields: `schema_version`,
    `task`, `created_utc`, `commit` and `commit_is_dirty` (null outside a git checkout), `environment` (versions, and
    the GPU that PyTorch sees, or the CPU), `config_sha256`, `seed`, `settings`, `numbers`. NaN and infinity become
    null, because JSON has neither.

    Args:
        path: the file to write; missing folders are made.
        numbers: what was measured; nested mappings, sequences and plain numbers.
        task: what was measured, for example "knn" or "transform_regression".
        seed: of the measurement.
        config_text: the resolved configuration; only its SHA-256 is stored.
        settings: how it was measured (data, size, k, ...).

    Raises:
        TypeError: if a value cannot be written as JSON; names it.
    """
    commit, is_dirty = _git_state()
    document = {
        "schema_version": SCHEMA_VERSION,
        "task": task,
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "commit_is_dirty": is_dirty,
        "environment": _environment(),
        "config_sha256": None if config_text is None else hashlib.sha256(config_text.encode()).hexdigest(),
        "seed": seed,
        "settings": _plain(dict(settings or {}), "settings"),
        "numbers": _plain(dict(numbers), "numbers"),
    }
    write_text_atomically(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
    return path


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that the file holds either its old content or all of the new, even after a crash."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_text_atomically`, of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def folder_name(name: str) -> str:
    """Return a name, such as `hub:dinov2_vits14` or `random:vit_small/14`, as that of one folder."""
    return re.sub(r"[^\w.()-]+", "_", name).strip("._") or "unnamed"


def _plain(value: Any, where: str) -> Any:
    """Return `value` in JSON's own types; `where` names it in an error."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, torch tensors
        return _plain(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"{where} must be a number, text, list or mapping to be written to results.json, got {type(value)}")


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model(),
        "cpu_cores": os.cpu_count(),
    }


def _cpu_model() -> str:
    """Return the name of the processor as Linux knows it, elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit this package was run from and whether its checkout has uncommitted changes.

    An installed package may lie inside another project's checkout; asking git whether it tracks this very file tells
    the two apart.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """Return the output of a git command run in this file's folder, or None where git or the checkout is missing."""
    try:
        completed = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
