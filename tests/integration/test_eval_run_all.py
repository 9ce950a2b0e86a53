"""`eval/run_all.py`: pairs of backbones and tasks, each measured once, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dinov2_equi.evaluation.results import write_results

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "run_all.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a plan of two backbones and two tasks, with changes."""

    def write(**changes: Any) -> Path:
        content = {
            "output": str(tmp_path / "out"),
            "models": {"ours": "runs/a", "random": "random:vit_small/14"},
            "tasks": {
                "classes": {"script": "eval/classification/run.py", "arguments": "--data 'a b' --tasks knn"},
                "moves": {"script": "eval/equivariance/run.py"},
            },
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.fixture
def started(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Write results instead of starting a script; returns the list that fills with the commands."""
    commands: list[tuple[str, ...]] = []

    def start(command: tuple[str, ...]) -> tuple[int, str]:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1])
        score = 0.25 if "random" in str(folder) else 0.5
        if "classification" in command[1]:
            write_results(folder / "results.json", {"m": {"knn": {"top1": {"20": score}}}}, task="classification")
        else:
            r2 = {"both": {"pooled": {"mean": score / 2}}}
            numbers = {"m": {"families": {"rotation": {"r2": r2}}}}
            write_results(folder / "results.json", numbers, task="equivariance")
        return 0, ""

    monkeypatch.setattr(script, "start", start)
    return commands


def test_pair_is_missing_in_a_table(
    script: ModuleType, plan: Callable[..., Path], started: list[tuple[str, ...]], tmp_path: Path
) -> None:
    assert script.main([str(plan())]) == 0
    assert [command[2:4] for command in started] == [("--weights", "runs/a")] * 2 + [
        ("--weights", "random:vit_small/14")
    ] * 2
    assert started[0][4:8] == ("--data", "a b", "--tasks", "knn")
    out = tmp_path / "out"
    table = (out / "summary.md").read_text().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == ["k-NN", "R2 rotation"]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["ours", "0.500", "0.250"]
    assert (out / "summary.csv").read_text() == "model,k-NN,R2 rotation\nours,0.5,0.25\nrandom,0.25,0.125\n"
    assert "\\toprule" in (out / "summary.tex").read_text()
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "summary_radar.png").exists()  # two numbers make no area
    assert json.loads((out / "summary.json").read_text())["numbers"]["rows"]["ours"] == {
        "k-NN": 0.5,
        "R2 rotation": 0.25,
    }


def test_finished_pair_is_repeated_or_a_changed_one_is_not(
    script: ModuleType, plan: Callable[..., Path], started: list[tuple[str, ...]]
) -> None:
    assert script.main([str(plan())]) == script.main([str(plan())]) == 0
    assert len(started) == 4
    changed = {"classes": {"script": "eval/classification/run.py", "arguments": "--data c"}}
    assert script.main([str(plan(tasks=changed))]) == 0
    assert [command[5] for command in started[4:]] == ["c", "c"]


def test_failed_pair_takes_the_others_with_it(
    script: ModuleType,
    plan: Callable[..., Path],
    started: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    succeed = script.start

    def start(command: tuple[str, ...]) -> tuple[int, str]:
        has_failed = "runs/a" in command and "equivariance" in command[1]
        return (1, "error: no memory left") if has_failed else succeed(command)

    monkeypatch.setattr(script, "start", start)
    assert script.main([str(plan())]) == 1
    assert "ours,0.5,\n" in (tmp_path / "out" / "summary.csv").read_text()
    assert "FAILED: ours, moves\nerror: no memory left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "needs models"),
        ({"output": 3}, "needs output, a folder"),
        ({"tasks": {"x": {"arguments": "a"}}}, "task x needs script"),
        ({"tasks": {"x": {"script": "eval/nothing.py"}}}, "there is no script"),
    ],
)
def test_wrong_plan_gives_a_traceback(
    script: ModuleType,
    plan: Callable[..., Path],
    started: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert script.main([str(plan(**changes))]) == 2
    assert message in capsys.readouterr().err
    assert started == []


def test_example_names_a_script_that_is_gone(script: ModuleType) -> None:
    _, pairs = script.read_plan(REPOSITORY / "eval" / "compare.yaml")
    assert len(pairs) == 6
