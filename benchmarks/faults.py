"""Faults of every kind, injected on purpose into the run of `configs/debug_cpu.yaml`; one table of what became of them.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 25 --flips 10000 --non-finite 1000 --signals 50 --output faults.json
    python benchmarks/faults.py --kills 0 --signals 0        # what takes place inside this process, two minutes

* kills: `kill -9` of a real training process after a random number of log lines, then a resume to the end.
* signals: SIGTERM, SIGUSR1, SIGUSR2 and SIGINT in turn at random moments between the first step and the end.
* crash points: every open, read, write, fsync, rename, unlink, mkdir, rmdir and close of a save fails in turn, with
  EIO, ENOSPC or EROFS, once or from there on, or the process ends there.
* flips: a random bit of a random file of a checkpoint inverted, or the file cut.
* non-finite: NaN, inf or -inf in one pixel of a batch, one loss or one element of a gradient.
* hostile: files that would execute, exhaust memory or pass for weights, each read in a process of its own.

A count of 0 leaves a campaign out. The exit code is 1 if a promise was broken; each such case is printed. Linux only.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.fault_campaigns import damage, disk, hostile, non_finite, small_run, stops  # noqa: E402 (path guard)
from benchmarks.fault_campaigns.outcome import Outcome  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402

_SHOWN_FAILURES = 20


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=_count, default=5, metavar="N", help="about 15 s each (default 5)")
    add("--crash-points", type=_count, metavar="N", help="so many, evenly spread (default: all)")
    add("--flips", type=_count, default=1000, metavar="N", help="bit flips and truncations (default 1000)")
    add("--non-finite", type=_count, default=100, metavar="N", help="values injected (default 100)")
    add("--signals", type=_count, default=5, metavar="N", help="about 15 s each (default 5)")
    add("--hostile", type=_count, metavar="N", help="the first so many files (default: all)")
    add("--seed", type=int, default=0, help="of the random moments, bits and places (default 0)")
    add("--output", type=Path, metavar="FILE", help="write the numbers as JSON as well")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def run_campaigns(args: argparse.Namespace, folder: Path) -> dict[str, tuple[Outcome, float]]:
    """Return outcome and seconds of every campaign that was asked for."""
    run = small_run.start(f"train.max_nonfinite_steps={args.non_finite + 1}")  # never back to a checkpoint
    reference = stops.whole_run(folder / "whole") if args.kills or args.signals else ""

    def rng(campaign: str) -> random.Random:
        return random.Random(f"{args.seed}/{campaign}")

    campaigns: dict[str, tuple[int | None, Callable[[Path], Outcome]]] = {
        "kills": (args.kills, lambda path: stops.kills(args.kills, path, reference, rng("kills"))),
        "crash_points": (args.crash_points, lambda path: disk.crash_points(run, path, args.crash_points)),
        "flips": (args.flips, lambda path: damage.damages(run, path, args.flips, rng("flips"))),
        "non_finite": (
            args.non_finite,
            lambda path: non_finite.non_finite_steps(run, path, args.non_finite, rng("non_finite")),
        ),
        "signals": (args.signals, lambda path: stops.signals(args.signals, path, reference, rng("signals"))),
        "hostile": (args.hostile, lambda path: hostile.hostile_files(run, path, args.hostile)),
    }
    outcomes = {}
    for name, (count, campaign) in campaigns.items():
        if count == 0:
            continue
        path = folder / name
        path.mkdir()
        start = time.perf_counter()
        outcomes[name] = (campaign(path), time.perf_counter() - start)
    return outcomes


def print_table(outcomes: dict[str, tuple[Outcome, float]]) -> None:
    """Print a line for each campaign and what broke its promise."""
    print(f"{'campaign':<14}{'cases':>7}{'broken':>8}{'seconds':>9}  promise")
    for name, (outcome, seconds) in outcomes.items():
        print(f"{name:<14}{outcome.cases:7}{len(outcome.failures):8}{seconds:9.0f}  {outcome.promise}")
    for name, (outcome, _) in outcomes.items():
        for failure in outcome.failures[:_SHOWN_FAILURES]:
            print(f"{name}: {failure}")
        if len(outcome.failures) > _SHOWN_FAILURES:
            print(f"{name}: and {len(outcome.failures) - _SHOWN_FAILURES} more")


def main(argv: list[str] | None = None) -> int:
    """Run the campaigns, print the table, write it where asked; return 1 if a promise was broken."""
    args = parse_arguments(argv)
    logging.disable(logging.ERROR)  # a warning for each damaged checkpoint and skipped step is what is expected here
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the hostile files
        outcomes = run_campaigns(args, Path(folder))
    logging.disable(logging.NOTSET)
    print_table(outcomes)
    if args.output is not None:
        numbers = {
            name: {
                "cases": outcome.cases,
                "broken": len(outcome.failures),
                "seconds": round(seconds, 1),
                "promise": outcome.promise,
                "failures": outcome.failures,
                **outcome.details,
            }
            for name, (outcome, seconds) in outcomes.items()
        }
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "seed")}
        write_results(args.output, numbers, task="faults", seed=args.seed, settings=settings)
    return int(any(outcome.failures for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
