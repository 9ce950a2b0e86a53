"""Measure several backbones with several harnesses, and put what they reached into one table and two figures.

    python eval/run_all.py eval/compare.yaml

The file names backbones and tasks; every pair is measured by its own script in its own folder, OUTPUT/MODEL/TASK. A
pair that is finished with the same arguments is not repeated, one that fails is named at the end and left out.

    output: runs/compare
    models:
      ours: runs/mine
      random: random:runs/mine
    tasks:
      classification: {script: eval/classification/run.py, arguments: --data FOLDER --tasks knn linear}
      equivariance: {script: eval/equivariance/run.py, arguments: --data FOLDER --seeds 0}

Writes summary.md, summary.csv, summary.tex, summary.json, summary.png with bars, and from three numbers a backbone on
summary_radar.png, into OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from dinov2_equi.evaluation.dense.settings import read_mapping
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.results import write_results, write_text_atomically
from dinov2_equi.evaluation.summary import as_csv, as_latex, as_markdown, bar_figure, headline_numbers, radar_figure
from dinov2_equi.run.command import EXIT_DONE, EXIT_FAILED, command_parser, run_command

ROOT = Path(__file__).resolve().parents[1]
RESULTS_FILE, ARGUMENTS_FILE, RADAR_FILE = "results.json", "arguments.json", "summary_radar.png"
_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Pair:
    """One backbone and one task: the command, and where its results go."""

    model: str
    task: str
    command: tuple[str, ...]
    folder: Path

    def is_finished(self) -> bool:
        """Return whether the folder holds the results of exactly this command."""
        note = self.folder / ARGUMENTS_FILE
        if not (note.is_file() and (self.folder / RESULTS_FILE).is_file()):
            return False
        return bool(json.loads(note.read_text(encoding="utf-8")) == list(self.command))


def read_plan(path: Path) -> tuple[Path, list[Pair]]:
    """Return the output folder and all pairs of a file, backbone by backbone.

    Raises:
        ValueError: if a part is missing or of another kind; says which.
        OSError: if the file or a script cannot be read.
    """
    plan = read_mapping(path)
    for key, kind in (("output", str), ("models", dict), ("tasks", dict)):
        if not isinstance(plan.get(key), kind) or not plan[key]:
            raise ValueError(f"{path} needs {key}, {'a folder' if kind is str else 'names with what they stand for'}")
    output = Path(plan["output"]).expanduser()
    pairs = [
        _make_pair(output, str(model), str(weights), str(task), how)
        for model, weights in plan["models"].items()
        for task, how in plan["tasks"].items()
    ]
    return output, pairs


def _make_pair(output: Path, model: str, weights: str, task: str, how: Any) -> Pair:
    if not isinstance(how, dict) or set(how) - {"script", "arguments"} or "script" not in how:
        raise ValueError(f"task {task} needs script, and may have arguments; got {how!r}")
    script = ROOT / how["script"]
    if not script.is_file():
        raise OSError(f"task {task}: there is no script {script}")
    folder = output / model / task
    words = shlex.split(str(how.get("arguments") or ""))
    command = (sys.executable, str(script), "--weights", weights, *words, "--output", str(folder))
    return Pair(model, task, command, folder)


def measure(pair: Pair) -> dict[str, float] | str:
    """Measure a pair unless that is done, and return its numbers, or what went wrong."""
    if not pair.is_finished():
        code, errors = start(pair.command)
        if code:
            return (errors.strip() or f"exit code {code}")[-_SHOWN_CHARACTERS:]
        write_text_atomically(pair.folder / ARGUMENTS_FILE, json.dumps(list(pair.command)) + "\n")
    document = json.loads((pair.folder / RESULTS_FILE).read_text(encoding="utf-8"))
    return headline_numbers(document)


def start(command: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it wrote to stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def write_summary(output: Path, cells: dict[str, dict[str, float]], failed: dict[str, str], plan: Path) -> None:
    """Write the table in every form, and the figure."""
    write_text_atomically(output / "summary.md", as_markdown(cells))
    write_text_atomically(output / "summary.csv", as_csv(cells))
    write_text_atomically(output / "summary.tex", as_latex(cells))
    write_figure(output / "summary.png", bar_figure(cells))
    radar = radar_figure(cells)
    if radar is not None:
        write_figure(output / RADAR_FILE, radar)
    settings = {"plan": read_mapping(plan)}
    write_results(output / "summary.json", {"rows": cells, "failed": failed}, task="run_all", settings=settings)


def command(args: argparse.Namespace) -> int:
    """Measure every pair, write the summary, and say what failed."""
    output, pairs = read_plan(args.plan)
    cells: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for pair in pairs:
        result = measure(pair)
        name = f"{pair.model}, {pair.task}"
        if isinstance(result, str):
            failed[name] = result
        else:
            cells.setdefault(pair.model, {}).update(result)
        print(f"{'FAILED' if name in failed else 'done'}: {name}", flush=True)
    if cells:
        write_summary(output, cells, failed, args.plan)
        print("\n" + as_markdown(cells) + f"\nwritten: {output}/summary.md, .csv, .tex, .json, pictures")
    for name, reason in failed.items():
        print(f"\nFAILED: {name}\n{reason}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="CONFIG", help="YAML file with output, models and tasks")
    return run_command(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
