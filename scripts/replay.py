"""Run a step again whose loss or gradient was not finite, and say where it began.

    python scripts/replay.py runs/mine/replay/step_00001234

A run that stops for this reason leaves such a folder and names it. Exit code 0: the step is not finite again; 1: this
time it is; 2: there is no such folder, or it is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)

from dinov2_equi.fsdp.manifest import CheckpointError  # noqa: E402
from dinov2_equi.train.replay import Replay, replay_step  # noqa: E402

SHOWN = 10


def describe(replay: Replay) -> str:
    """Return what happened, for people."""
    lines = [f"{name:<28}{value:>14.6g}" for name, value in replay.losses.items()]
    if replay.first_module is not None:
        lines.append(f"first module with an output that is not finite: {replay.first_module}")
    if replay.gradients:
        further = f" and {len(replay.gradients) - SHOWN} more" if len(replay.gradients) > SHOWN else ""
        lines.append(f"gradients that are not finite: {', '.join(replay.gradients[:SHOWN])}{further}")
    lines.append("finite this time: a fault of the machine, or of a kernel" if replay.is_finite else "reproduced")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the folder that the run named")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args(argv)
    try:
        replay = replay_step(args.bundle, torch.device(args.device))
    except (CheckpointError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(describe(replay))
    return 1 if replay.is_finite else 0


if __name__ == "__main__":
    sys.exit(main())
