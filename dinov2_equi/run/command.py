"""What the command line tools share: how they parse, and how they end when the input is at fault."""

from __future__ import annotations

import argparse
import atexit
import signal
import sys
from collections.abc import Callable

import torch

from dinov2_equi.data.signals import end_workers
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.run import job
from dinov2_equi.run.allocator import keep_freed_memory
from dinov2_equi.train.stopping import RunStopped

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_STOPPED = job.EXIT_STOPPED

_OUT_OF_MEMORY = (
    "error: the device has not enough memory: take smaller batches, crops or images, or another device; what is "
    "finished is kept"
)
_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the message of PyTorch's plain RuntimeError where the memory of the machine does not suffice."""

EXIT_CODES = (
    "exit codes: 0 done, 1 a part failed, 2 something in the command or the data is wrong, 75 stopped by a signal, "
    "130 interrupted"
)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring as it is written, examples included."""
    return argparse.ArgumentParser(
        description=description, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `run_command` checks."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, metavar="NAME", help=f"cpu, cuda, cuda:1, ... (default: {found})")


def add_knn_devices(parser: argparse.ArgumentParser) -> None:
    """Add `--knn-devices`, which `run_command` checks."""
    among = "several among which the training features are divided for k-NN (default: --device)"
    parser.add_argument("--knn-devices", nargs="+", default=[], metavar="NAME", help=among)


def run_command(
    command: Callable[[argparse.Namespace], int], args: argparse.Namespace, *, interrupted: str = "interrupted"
) -> int:
    """Return the exit code of a command; a fault of the input ends in one line on stderr instead of a traceback.

    Args:
        command: returns the exit code.
        args: what it is given; where they hold a `device` or `knn_devices`, these are checked first.
        interrupted: what is said after Ctrl-C.
    """
    keep_freed_memory()
    atexit.unregister(end_workers)  # once, also where a process runs several commands
    atexit.register(end_workers)
    try:
        for name in (getattr(args, "device", "cpu"), *getattr(args, "knn_devices", ())):
            check_device(name)
        return command(args)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        return _end(f"error: {_one_line(error)}", EXIT_USER_ERROR)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _end(_OUT_OF_MEMORY, EXIT_USER_ERROR)
    except RunStopped as stopped:
        return _end(str(stopped), EXIT_INTERRUPTED if stopped.signal == signal.SIGINT else EXIT_STOPPED)
    except KeyboardInterrupt:
        return _end(interrupted, EXIT_INTERRUPTED)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of a device, or of the machine, does not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)


def _end(message: str, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _one_line(error: Exception) -> str:
    """Return the message of an error; of one from a loader process, which brings a traceback, its last line."""
    text = str(error).strip()
    if text.startswith("Caught ") and "worker process" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: names it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"a device is cpu, cuda, cuda:1, ...; got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name}: PyTorch sees {count} CUDA devices here; take --device cpu or another")
