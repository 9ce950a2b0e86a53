"""The first thing that runs in a task of a SLURM job, in the place of Python: `start_job.py -u -m MODULE FOLDER`.

Keeps the signals that SLURM sends waiting until the job listens to them; they would end a Python that still loads.
"""

from __future__ import annotations

import signal
import sys

KEPT_WAITING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM comes with a pre-emption and with plain `scancel`; which one it was the job asks SLURM when it listens."""


def main() -> None:
    """Block the signals and run submitit's job from the folder that is the last word of the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_WAITING)
    sys.path[0] = sys.path[0].removesuffix("/dinov2_equi/run")  # a file's folder is no place for modules of that name
    from submitit.core.submission import submitit_main

    sys.argv = [sys.argv[0], sys.argv[-1]]
    submitit_main()


if __name__ == "__main__":
    main()
