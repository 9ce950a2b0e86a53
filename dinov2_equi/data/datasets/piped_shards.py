"""Tar shards that a command writes to its output, such as a download: each is kept on the disk while it is in use."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.listed import IMAGE_SUFFIXES
from dinov2_equi.data.datasets.stored_index import index_places, load_index, store_index
from dinov2_equi.data.datasets.tar_shards import (
    INDEX_ARRAYS,
    TarShards,
    expand_braces,
    fit_each_other,
    join_scans,
    scan_shard,
)
from dinov2_equi.logging.progress import tracked

logger = logging.getLogger(__name__)

DEFAULT_BUFFER = 8
_ATTEMPTS = 3
_COARSE_S = 0.1  # by which a file system's clock may be behind
_SHOWN = 300  # characters of what a command says


class PipedShards(TarShards):
    """The images of tar shards, each the output of a command, in the order of the shards and within them.

    At the first start every shard is read once, for the index, which is stored in the user's cache under the commands.
    A training takes the images window by window: `buffer` shards in random order are on the disk together, in the
    folder for temporary files, and their images are shuffled. All processes of a machine share them; what was used
    least recently makes place. A resume anywhere costs the shards of its window, `buffer` at most.

    Args:
        command: For the shell, with numbers as in `cat shards/train-{000..146}.tar`; one shard for each.
        buffer: Shards of a window.
        suffixes: What the names of images end in.

    Raises:
        DatasetError: A command fails or writes no whole tar file, or no image is in them; says what it said.
    """

    def __init__(self, command: str, buffer: int = DEFAULT_BUFFER, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        commands = list(expand_braces(command.strip()))
        if not commands[0]:
            raise DatasetError("pipe: expected a command, such as pipe:cat shards/train-{000..146}.tar")
        self._cache = _ShardCache(commands, 2 * buffer + 1)  # processes are ahead in the next window
        places = index_places(["pipe", commands, suffixes])
        arrays = load_index(places, (*INDEX_ARRAYS, "shard_bytes"), fit_each_other)
        if arrays is None:
            arrays = store_index(places, self._scan(suffixes))
        self._cache.expected = arrays["shard_bytes"].tolist()
        self._take_index(arrays, [_label(command) for command in commands], f"the output of {command}", suffixes)
        self.buffer = buffer

    def _scan(self, suffixes: tuple[str, ...]) -> dict[str, np.ndarray]:
        numbers = range(len(self._cache.commands))
        shown = tracked(numbers, f"Indexing {len(numbers)} shards")
        parts, sizes = [], []
        for number in shown:
            file = self._cache.fetch(number, is_new=True)
            parts.append(scan_shard(number, file, suffixes))
            sizes.append(file.stat().st_size)
        return {**join_scans(parts), "shard_bytes": np.array(sizes, np.int64)}

    def path(self, index: int) -> str:
        """Return the command whose output holds image `index`, and its path there."""
        return f"{self._cache.commands[int(self.shard_numbers[index])]}: {self.name(index)}"

    def _open(self, shard: int) -> int:
        return self._cache.open(shard)


def _label(command: str) -> Path:
    """Return what a shard is called: the last word of its command that looks like a tar file."""
    words = [word for word in command.split() if ".tar" in word]
    return Path(words[-1] if words else command)


class _ShardCache:
    """The last shards that were used, as files that all processes of the machine share.

    Args:
        commands: What writes each shard to its output.
        capacity: Shards on the disk at most.
    """

    def __init__(self, commands: Sequence[str], capacity: int) -> None:
        self.commands = list(commands)
        self.expected: list[int] = []
        """Bytes of each shard when it was indexed; empty before."""
        self._capacity = capacity
        self._began = time.time() - _COARSE_S
        name = hashlib.sha256("\n".join(commands).encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"dinov2_equi_shards_{os.getuid()}" / name

    def open(self, shard: int) -> int:
        """Return an open file descriptor of a shard, which another process may delete meanwhile."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # deleted between the two: fetched again
                return os.open(self.fetch(shard), os.O_RDONLY)

    def fetch(self, shard: int, *, is_new: bool = False) -> Path:
        """Return the file of a shard; where it is not there, its command is run, by one process at a time.

        Args:
            shard: Number of the command.
            is_new: Take no file that was there when this process began: the shard is to be indexed as it is now.
        """
        file = self._folder / f"{shard:06d}.tar"
        if not self._is_there(file, shard, is_new):
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / f"{shard:06d}.lock"):
                if not self._is_there(file, shard, is_new):
                    self._run(shard, file)
                    self._make_place(file)
        with contextlib.suppress(FileNotFoundError):
            os.utime(file)
        return file

    def _is_there(self, file: Path, shard: int, is_new: bool) -> bool:
        try:
            facts = file.stat()
        except FileNotFoundError:
            return False
        if is_new and facts.st_mtime < self._began:
            return False
        return not self.expected or facts.st_size == self.expected[shard]

    def _run(self, shard: int, file: Path) -> None:
        pending = file.with_suffix(".tmp")
        # What a killed process has left; its command, which may still run, writes into a file without a name.
        pending.unlink(missing_ok=True)
        for attempt in range(1, _ATTEMPTS + 1):
            with pending.open("wb") as output:
                done = subprocess.run(
                    ["/bin/sh", "-c", self.commands[shard]], stdout=output, stderr=subprocess.PIPE, check=False
                )
            if done.returncode == 0:
                break
            said = done.stderr.decode(errors="replace").strip()[-_SHOWN:]
            ending = f"ended with exit code {done.returncode}: {said or 'it said nothing'}"
            message = f"the command {self.commands[shard]!r} {ending}"
            if attempt == _ATTEMPTS:
                pending.unlink()
                raise DatasetError(message)
            logger.warning("%s; it is run again", message)
            time.sleep(attempt - 1)
        size = pending.stat().st_size
        if self.expected and size != self.expected[shard]:
            pending.unlink()
            raise DatasetError(
                f"the command {self.commands[shard]!r} wrote {size} bytes, and {self.expected[shard]} when its index "
                "was made: the shard has changed. Give it another name, or delete ~/.cache/dinov2_equi: it is made anew"
            )
        pending.rename(file)

    def _make_place(self, newest: Path) -> None:
        """Delete what was used least recently."""
        times = []
        for file in self._folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                times.append((file.stat().st_mtime_ns, file))
        for _, file in sorted(times)[: -self._capacity]:
            if file != newest:
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one process at a time into the block."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
