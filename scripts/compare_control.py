"""Train a configuration and its control (transform without reconstruction) over several seeds, and tabulate both.

    python scripts/compare_control.py --config configs/quickstart.yaml --output-dir runs/control --seeds 0 1 2

Each run is an ordinary training run in its own folder: a finished one is not trained again, an interrupted one goes on.
With `--knn-train` and `--knn-val` the k-NN accuracy is measured as well. Writes `comparison.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from dinov2_equi.evaluation.results import write_results  # noqa: E402 (after the path guard)

VARIANTS: dict[str, tuple[str, ...]] = {"reconstruction": (), "control": ("equi.loss_weight=0",)}
COLUMNS = {
    "r2_rotation_untrained": "rotation R2, random weights",
    "r2_rotation_trained": "rotation R2, trained",
    "knn_20": "k-NN, k = 20",
    "seconds": "training seconds",
}


@dataclass(frozen=True)
class Job:
    """One run: which variant, which seed, where."""

    variant: str
    seed: int
    folder: Path


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--knn-train", metavar="DATA", help="labelled images that vote")
    parser.add_argument("--knn-val", metavar="DATA", help="labelled images that are classified")
    parser.add_argument("--knn-size", type=int, default=64, help="image side for k-NN, pixels (default: 64)")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides for every run")
    args = parser.parse_intermixed_args()
    if bool(args.knn_train) != bool(args.knn_val):
        parser.error("--knn-train and --knn-val belong together")
    return args


def run_job(job: Job, args: argparse.Namespace) -> dict[str, float]:
    """Train one run, measure it, and return its numbers.

    Raises:
        RuntimeError: if a command fails; shows the end of its output.
    """
    overrides = [*args.opts, *VARIANTS[job.variant], f"train.seed={job.seed}"]
    train = [
        str(ROOT / "dinov2_equi/run/train.py"),
        "--config-file",
        str(args.config),
        "--output-dir",
        str(job.folder),
        *overrides,
    ]
    _call(train)
    numbers: dict[str, float] = json.loads((job.folder / "results.json").read_text())["numbers"]
    if args.knn_train:
        output = job.folder / "knn.json"
        knn = [
            str(ROOT / "eval/classification/knn.py"),
            "--run",
            str(job.folder),
            "--train",
            args.knn_train,
            "--val",
            args.knn_val,
        ]
        _call([*knn, "--size", str(args.knn_size), "--output", str(output)])
        accuracies: Mapping[str, float] = json.loads(output.read_text())["numbers"]["top1"]
        numbers |= {f"knn_{k}": value for k, value in accuracies.items()}
    sys.stdout.write(f"done: {job.variant}, seed {job.seed}: {numbers}\n")
    sys.stdout.flush()
    return numbers


def _call(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")


def summarise(rows: Sequence[tuple[Job, dict[str, float]]]) -> dict[str, dict[str, dict[str, object]]]:
    """Return variant -> measure -> mean, standard deviation (n - 1) and the values in the order of the seeds."""
    summary: dict[str, dict[str, dict[str, object]]] = {}
    for variant in VARIANTS:
        runs = [numbers for job, numbers in rows if job.variant == variant]
        summary[variant] = {}
        for key in COLUMNS:
            values = [run[key] for run in runs if key in run]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                summary[variant][key] = {"mean": statistics.fmean(values), "std": deviation, "values": values}
    return summary


def markdown(summary: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """Return the summary as a Markdown table, one row a variant."""
    keys = [key for key in COLUMNS if any(key in measures for measures in summary.values())]
    lines = ["| | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for variant, measures in summary.items():
        cells = [_cell(measures[key]) for key in keys]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(measure: Mapping[str, object]) -> str:
    spread = "" if measure["std"] is None else f" +- {measure['std']:.3f}"
    return f"{measure['mean']:.3f}{spread}"


def main() -> None:
    """Run all jobs and write the comparison."""
    args = parse_arguments()
    output_dir = args.output_dir.resolve()
    jobs = [Job(v, seed, output_dir / f"{v}_seed{seed}") for seed in args.seeds for v in VARIANTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(zip(jobs, pool.map(lambda job: run_job(job, args), jobs), strict=True))
    summary = summarise(rows)
    settings = {"config": str(args.config), "seeds": args.seeds, "overrides": args.opts, "knn_size": args.knn_size}
    write_results(output_dir / "comparison.json", summary, task="compare_control", settings=settings)
    sys.stdout.write(markdown(summary))


if __name__ == "__main__":
    main()
