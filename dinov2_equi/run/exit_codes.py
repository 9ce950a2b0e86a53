"""How the training command ends: one table for the command, its help and docs/run_folder.md."""

from __future__ import annotations

from collections.abc import Mapping

from dinov2_equi.run.command import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from dinov2_equi.train.watchdog import EXIT_HUNG

EXIT_NON_FINITE = 1

MEANINGS: Mapping[int, str] = {
    EXIT_DONE: "done",
    EXIT_NON_FINITE: "stopped by losses or gradients that were not finite",
    EXIT_USER_ERROR: "a fault in command, configuration or data, explained in one message",
    EXIT_STOPPED: "stopped by a signal, to be started again (SLURM: `RequeueExit=75`)",
    EXIT_HUNG: "hung for longer than `train.watchdog_seconds`; `logs/stacks.rank*.txt` say where",
    EXIT_INTERRUPTED: "stopped by Ctrl-C",
}


def describe_exit_codes() -> str:
    """Return the table as lines of a help text."""
    lines = [f"  {code:<4} {meaning.replace('`', '')}" for code, meaning in MEANINGS.items()]
    return "\n".join(["exit codes:", *lines])
