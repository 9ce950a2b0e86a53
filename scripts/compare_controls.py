"""Train a configuration and its controls over several seeds, and put what they reached into one table.

    python scripts/compare_controls.py --config configs/photos_2cores.yaml --output-dir runs/controls \
        --seeds 0 1 2 --jobs 2 --knn-train IMAGES/train --knn-val IMAGES/val \
        --probe "--train IMAGES/train --test IMAGES/val --seeds 0 --fractions" \
        train.dataset_path=IMAGES/train train.num_threads=1

Each control is a file in `configs/controls`, put after the configuration. `--controls base transform_only` takes some
of them; `base` is the configuration as it is. `--variant weight_30 equi.loss_weight=30` adds a row of your own.

Each run is an ordinary training run in its own folder, NAME_seedN: a finished one is not repeated, an interrupted one
goes on. With `--knn-train` and `--knn-val` the k-NN accuracy is measured too, and with `--probe` R2 of each family:
what it is given are arguments of `eval/equivariance/run.py`, in quotes. The random weights are probed once for each
seed, beside the first control.

Writes `comparison.json` and `comparison.md`, and prints the table. Exit code 1: a run failed, and the table lacks it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from dinov2_equi.config.load import ConfigError, to_yaml  # noqa: E402 (after the path guard)
from dinov2_equi.evaluation.results import write_results, write_text_atomically  # noqa: E402
from dinov2_equi.logging.metrics import METRICS_NAME, read_metrics  # noqa: E402
from dinov2_equi.train.settings import load_run_config, split_words  # noqa: E402

CONTROLS = ROOT / "configs" / "controls"
BASE = "base"
UNTRAINED = "(random weights)"
UNTRAINED_MARK = "untrained: "
LAST_SHARE = 0.1
"""Share of the run, at its end, over which logged losses are averaged: single steps are noisy."""
PROBE_FOLDER = Path("eval", "equivariance")
PROBE_COMMAND = "arguments.json"
"""What the probe in this folder was asked for, so that it is not repeated."""

OWN_PROBE = "r2_rotation"
COLUMNS = {
    OWN_PROBE: "R2 rotation, run's own probe",
    "knn": "k-NN",
    "ssl_loss": "SSL loss",
    "equi_loss": "equi loss",
    "gradient_ratio": "gradient ratio",
    "seconds_per_step": "s/step",
}
"""What is shown of each run, besides the R2 of each family that was measured."""

Numbers = dict[str, float]
Summary = dict[str, dict[str, dict[str, Any]]]
"""Row -> measure -> mean, std (n - 1; None for one run), values in the order of the seeds."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is put after the configuration."""

    name: str
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run: its variant, the command's arguments, and the configuration that they amount to."""

    variant: str
    seed: int
    folder: Path
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    config_text: str
    is_first: bool
    """The first of its seed: beside it the weights that the runs of this seed start from are measured."""

    def is_finished(self) -> bool:
        """Return whether the folder holds the results of exactly this run."""
        resolved = self.folder / "config.yaml"
        if not (resolved.is_file() and (self.folder / "results.json").is_file()):
            return False
        return resolved.read_text(encoding="utf-8") == self.config_text


def control_names() -> list[str]:
    """Return the names of the controls."""
    return sorted(path.stem for path in CONTROLS.glob("*.yaml"))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, type=Path, help="the configuration that is compared with its controls")
    add("--output-dir", required=True, type=Path, help="folder of the runs and of the table")
    names = control_names()
    add("--controls", nargs="*", default=names, metavar="NAME", help=f"of {BASE}, {', '.join(names)}; default: all")
    row = "a row of your own: its name, and what is put after the configuration"
    add("--variant", nargs="+", action="append", default=[], metavar=("NAME", "FILE|key=value"), help=row)
    add("--seeds", nargs="+", default=["0", "1", "2"], metavar="N", help="default: 0 1 2")
    add("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    add("--knn-train", metavar="DATA", help="labelled images that vote")
    add("--knn-val", metavar="DATA", help="labelled images that are classified")
    add("--knn-size", type=int, default=64, help="image side for k-NN, pixels (default: 64)")
    add("--knn-features", default="cls", metavar="NAME", help="cls, patch_mean or both (default: cls)")
    add("--k", type=int, default=20, help="neighbours (default: 20)")
    add("--probe", metavar='"ARGUMENTS"', help="measure R2 by eval/equivariance/run.py, which is given these arguments")
    add("--features", nargs="+", default=["both"], metavar="NAME", help="features whose R2 is shown (default: both)")
    add("words", nargs="*", metavar="FILE|key=value", help="for every run, before the controls")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, with `variants`, the rows of the table."""
    parser = get_parser()
    args = parser.parse_intermixed_args(argv)
    for name in ("controls", "seeds", "features"):  # a list takes all words up to the next option
        swallowed = [word for word in getattr(args, name) if "=" in word or word.endswith((".yaml", ".yml"))]
        setattr(args, name, [word for word in getattr(args, name) if word not in swallowed])
        args.words = [*swallowed, *args.words]
    if not args.seeds or not all(seed.isdecimal() for seed in args.seeds):
        parser.error(f"--seeds must be whole numbers from 0, got {' '.join(args.seeds) or 'none'}")
    args.seeds = list(map(int, args.seeds))
    if bool(args.knn_train) != bool(args.knn_val):
        parser.error("--knn-train and --knn-val belong together")
    args.variants = _variants(parser, args.controls, args.variant)
    return args


def _variants(parser: argparse.ArgumentParser, controls: Sequence[str], own: Sequence[Sequence[str]]) -> list[Variant]:
    names = [BASE, *control_names()]
    unknown = [name for name in controls if name not in names]
    if unknown:
        parser.error(f"no such control: {', '.join(unknown)}; choose of {', '.join(names)}")
    variants = [Variant(name, files=() if name == BASE else (CONTROLS / f"{name}.yaml",)) for name in controls]
    for name, *words in own:
        if not words or not name.replace("_", "").replace("-", "").isalnum():
            parser.error(f"--variant needs a name of letters, digits, - and _, and what differs; got {name} {words}")
        files, overrides = split_words(words)
        variants.append(Variant(name, tuple(files), tuple(overrides)))
    taken = [variant.name for variant in variants]
    if not taken or len(set(taken)) != len(taken):
        parser.error(f"rows need different names, and at least one; got {', '.join(taken) or 'none'}")
    return variants


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Return all runs, seed by seed, after writing what they share to `base.yaml`.

    The controls are put after `base.yaml`: an override for every run must not undo what a control is.

    Raises:
        ConfigError: for a configuration that is refused, before anything is trained.
    """
    output_dir = args.output_dir.resolve()
    files, overrides = split_words(args.words)
    base = output_dir / "base.yaml"
    write_text_atomically(base, to_yaml(load_run_config([args.config, *files], overrides)))
    first = args.variants[0]
    return [_make_job(variant, seed, base, variant is first) for seed in args.seeds for variant in args.variants]


def _make_job(variant: Variant, seed: int, base: Path, is_first: bool) -> Job:
    files, overrides = (base, *variant.files), (*variant.overrides, f"train.seed={seed}")
    config_text = to_yaml(load_run_config(files, overrides))
    folder = base.parent / f"{variant.name}_seed{seed}"
    return Job(variant.name, seed, folder, files, overrides, config_text, is_first)


def run_job(job: Job, args: argparse.Namespace) -> Numbers | str:
    """Train and measure one run unless that is done, and return its numbers, or what went wrong."""
    try:
        if not job.is_finished():
            files = [str(file) for file in job.files]
            _call("dinov2_equi/run/train.py", "--output-dir", str(job.folder), "--config-file", *files, *job.overrides)
        if args.knn_train:
            _measure_knn(job.folder, args)
        if args.probe is not None:
            _measure_r2(job, args.probe)
        numbers = read_numbers(job.folder, features=args.features, k=args.k)
    except (RuntimeError, OSError, ValueError) as error:
        _say(f"FAILED: {job.variant}, seed {job.seed}: {error}")
        return str(error)
    _say(f"done: {job.variant}, seed {job.seed}")
    return numbers


def _measure_knn(folder: Path, args: argparse.Namespace) -> None:
    output = folder / "knn.json"
    wanted = {
        "train": args.knn_train,
        "val": args.knn_val,
        "size": args.knn_size,
        "features": args.knn_features,
        "k": [args.k],
    }
    settings = json.loads(output.read_text())["settings"] if output.is_file() else {}
    if any(settings.get(key) != value for key, value in wanted.items()):
        options = [word for key in wanted if key != "k" for word in (f"--{key}", str(wanted[key]))]
        options += ["--k", str(args.k), "--output", str(output)]
        _call("eval/classification/knn.py", "--run", str(folder), *options)


def _measure_r2(job: Job, wanted: str) -> None:
    """Probe a run, and the random weights where it is the first of its seed, unless just that has been done."""
    weights = [str(job.folder), *(["random"] if job.is_first else [])]
    arguments = ["--weights", *weights, *shlex.split(wanted)]
    note = job.folder / PROBE_FOLDER / PROBE_COMMAND
    if not note.is_file() or json.loads(note.read_text()) != arguments:
        _call("eval/equivariance/run.py", *arguments, "--output", str(note.parent))
        write_text_atomically(note, json.dumps(arguments))


def _call(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def read_numbers(folder: Path, *, features: Sequence[str] = ("both",), k: int = 20) -> Numbers:
    """Return what a finished run has measured: its own results, its log, and k-NN and R2 where they are there."""
    own = json.loads((folder / "results.json").read_text())["numbers"]
    numbers = _read_log(folder)
    for key, name in ((OWN_PROBE, "trained"), (UNTRAINED_MARK + OWN_PROBE, "untrained")):
        if own.get(f"{OWN_PROBE}_{name}") is not None:
            numbers[key] = own[f"{OWN_PROBE}_{name}"]
    if (folder / "knn.json").is_file():
        accuracies = json.loads((folder / "knn.json").read_text())["numbers"]["top1"]
        if str(k) in accuracies:
            numbers["knn"] = accuracies[str(k)]
    return numbers | dict(_read_r2(folder, features))


def _read_log(folder: Path) -> Numbers:
    """Return the losses at the end, the last ratio of gradients, and the time of a step without the wait for data."""
    lines = read_metrics(folder / METRICS_NAME)
    weight = load_run_config(folder / "config.yaml").equi.loss_weight
    first_of_last = (1 - LAST_SHARE) * lines[-1]["iteration"]
    last = [line for line in lines if line["iteration"] >= first_of_last]
    equi = [line["equi_loss"] for line in last if "equi_loss" in line]
    ratios = [line["equi/gradient_ratio"] for line in lines if "equi/gradient_ratio" in line]
    numbers = {
        "ssl_loss": statistics.fmean(line["total_loss"] - weight * line.get("equi_loss", 0.0) for line in last),
        "seconds_per_step": statistics.median(line["time/step"] - line["time/data"] for line in lines),
    }
    if equi:
        numbers["equi_loss"] = statistics.fmean(equi)
    return numbers | ({"gradient_ratio": ratios[-1]} if ratios else {})


def _read_r2(folder: Path, features: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield `R2 FAMILY` and its mean over the seeds of the probe, for each family that was measured of a run.

    The first of the features need not be named in the table, further ones stand behind a comma.
    """
    path = folder / PROBE_FOLDER / "results.json"
    models = json.loads(path.read_text())["numbers"] if path.is_file() else {}
    for mark, model in (("", folder.name), (UNTRAINED_MARK, f"{folder.name} before training")):
        for family, scores in models.get(model, {"families": {}})["families"].items():
            for name in features:
                if name in scores["r2"]:
                    suffix = "" if name == features[0] else f", {name}"
                    yield f"{mark}R2 {family}{suffix}", scores["r2"][name]["pooled"]["mean"]


def summarise(runs: Sequence[tuple[Job, Numbers]]) -> Summary:
    """Return the summary of finished runs by variant, and of the weights they started from, one set for each seed."""
    rows: dict[str, list[Numbers]] = {}
    untrained: dict[int, Numbers] = {}
    for job, numbers in runs:
        rows.setdefault(job.variant, []).append({k: v for k, v in numbers.items() if not k.startswith(UNTRAINED_MARK)})
        started_from = {k.removeprefix(UNTRAINED_MARK): v for k, v in numbers.items() if k.startswith(UNTRAINED_MARK)}
        untrained.setdefault(job.seed, {}).update(started_from)
    rows[UNTRAINED] = list(untrained.values())
    return {name: measures for name, values in rows.items() if (measures := _summarise_row(values))}


def _summarise_row(runs: Sequence[Numbers]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for run in runs for key in run)
    return {key: _statistics([run[key] for run in runs if key in run]) for key in keys}


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def markdown(summary: Summary) -> str:
    """Return the summary as a Markdown table, one line a row."""
    present = dict.fromkeys(key for measures in summary.values() for key in measures)
    titles = {key: key for key in sorted(present) if key.startswith("R2 ")}
    titles |= {key: title for key, title in COLUMNS.items() if key in present}
    lines = ["| | " + " | ".join(titles.values()) + " | runs |", "|---" * (len(titles) + 2) + "|"]
    for name, measures in summary.items():
        cells = [_cell(measures.get(key)) for key in titles]
        runs = max(len(measure["values"]) for measure in measures.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {runs} |")
    return "\n".join(lines) + "\n"


def _cell(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return ""
    spread = "" if measure["std"] is None else f" ± {measure['std']:.3f}"
    return f"{measure['mean']:.3f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all jobs and write the comparison; return the exit code."""
    args = parse_arguments(argv)
    try:
        jobs = make_jobs(args)
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(zip(jobs, pool.map(lambda job: run_job(job, args), jobs), strict=True))
    finished = [(job, numbers) for job, numbers in results if not isinstance(numbers, str)]
    failed = {f"{job.variant}_seed{job.seed}": reason for job, reason in results if isinstance(reason, str)}
    summary = summarise(finished)
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "variants", "jobs")}
    output_dir = args.output_dir.resolve()
    write_results(
        output_dir / "comparison.json",
        {"rows": summary, "failed": failed},
        task="compare_controls",
        config_text=(output_dir / "base.yaml").read_text(encoding="utf-8"),
        settings=settings,
    )
    write_text_atomically(output_dir / "comparison.md", markdown(summary))
    _say(markdown(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
