"""Forked processes that stand in for the ranks of a group, for tests."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

_EXCEPTION = 99
_PATIENCE_S = 400


def fork_ranks(world_size: int, run: Callable[[int], int | None]) -> list[int]:
    """Call `run` with its rank in so many forked processes; return their numbers. They end with what it returns."""
    return [_fork(run, rank) for rank in range(world_size)]


def exit_codes(children: Sequence[int]) -> list[int]:
    """Wait for processes and return how they ended; 99 for an exception, -n for signal n."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def launch_ranks(world_size: int, command: Callable[[], int], *, on_a_machine: int = 0) -> list[int]:
    """Start a command in so many processes as a launcher does, by environment variables; return their numbers.

    Args:
        world_size: processes.
        command: returns the exit code.
        on_a_machine: processes of one machine; 0: all.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])

    def run(rank: int) -> int:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(on_a_machine or world_size))
        return command()

    return fork_ranks(world_size, run)


def in_a_group(world_size: int, folder: Path, function: Callable[[int], None]) -> None:
    """Call a function with its rank in processes of one gloo group; an exception there fails here.

    Args:
        world_size: processes; a single one has no group.
        folder: where they find each other.
        function: what each does.
    """
    rendezvous = folder / "rendezvous"
    rendezvous.unlink(missing_ok=True)

    def run(rank: int) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        function(rank)

    assert exit_codes(fork_ranks(world_size, run)) == [0] * world_size


def _fork(run: Callable[[int], int | None], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(_PATIENCE_S)  # one that waits for another for ever fails its test
    code = _EXCEPTION  # whatever happens, a test process must not go on here
    try:
        code = run(rank) or 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)
