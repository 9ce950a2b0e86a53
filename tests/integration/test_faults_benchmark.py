"""The campaigns of `benchmarks/faults.py`: they pass, and they do not where what they test is taken away."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.fault_campaigns import damage, disk, hostile, non_finite, small_run
from benchmarks.fault_campaigns.small_run import SmallRun
from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp.manifest import CheckpointError, parse_manifest
from dinov2_equi.models import weights
from dinov2_equi.train import step as step_module

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")

REPOSITORY = Path(__file__).resolve().parents[2]


def flags(counts: dict[str, int]) -> list[str]:
    return [f"--{name}={count}" for name, count in counts.items()]


@pytest.fixture
def run() -> SmallRun:
    return small_run.start("train.max_nonfinite_steps=1000")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(REPOSITORY / "benchmarks" / "faults.py")


def test_the_campaigns_inside_the_process_find_a_fault(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "faults.json"
    counts = {"kills": 0, "signals": 0, "crash-points": 2, "flips": 4, "non-finite": 6, "hostile": 4}
    code = script.main([*flags(counts), "--output", str(output)])
    table = capsys.readouterr().out
    assert code == 0, table
    numbers = json.loads(output.read_text())["numbers"]
    assert {name: row["cases"] for name, row in numbers.items()} == {
        "crash_points": 2,
        "flips": 4,
        "non_finite": 6,
        "hostile": 4,
    }
    assert all(row["broken"] == 0 and f"\n{name} " in table for name, row in numbers.items())


@pytest.mark.slow
def test_the_campaigns_with_processes_find_a_fault(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "faults.json"
    counts = {"kills": 1, "signals": 1, "crash-points": 0, "flips": 0, "non-finite": 0, "hostile": 0}
    assert script.main([*flags(counts), "--output", str(output)]) == 0
    assert {name: row["cases"] for name, row in json.loads(output.read_text())["numbers"].items()} == {
        "kills": 1,
        "signals": 1,
    }


@pytest.mark.slow
def test_a_hostile_file_is_accepted(run: SmallRun, tmp_path: Path) -> None:
    outcome = hostile.hostile_files(run, tmp_path, None)
    assert outcome.failures == []
    assert outcome.cases >= 30


@pytest.mark.parametrize("arguments", [["--kills", "-1"], ["--flips", "many"]])
def test_a_wrong_count_is_not_explained(
    script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert arguments[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- campaigns that must fail


def test_damage_goes_unseen_without_hashes(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint_module,
        "read_verified_manifest",
        lambda directory: parse_manifest((directory / "manifest.json").read_text(errors="replace")),
    )
    outcome = damage.damages(run, tmp_path, 20, random.Random(0))
    assert len(outcome.failures) > 5


@pytest.mark.slow
def test_a_save_without_a_rename_passes(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(store: checkpoint_module.CheckpointStore, partial: Path, target: Path) -> None:
        if target.exists():
            checkpoint_module.shutil.rmtree(target)
        partial.rename(target)

    monkeypatch.setattr(checkpoint_module.CheckpointStore, "_publish", in_place)
    assert disk.crash_points(run, tmp_path, 80).failures


def test_a_step_without_its_guard_passes(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "_check_finite", lambda *_: None)
    outcome = non_finite.non_finite_steps(run, tmp_path, 3, random.Random(0))
    assert len(outcome.failures) >= 3


def test_an_executing_pickle_passes(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_read_torch", lambda path: torch.load(path, map_location="cpu", weights_only=False))
    name = "torch.save, pickle that calls eval"
    monkeypatch.setattr(hostile, "WEIGHT_FILES", {name: hostile.WEIGHT_FILES[name]})
    assert hostile.hostile_files(run, tmp_path, 1).failures == [f"{name}: its code was executed"]


def test_a_crash_or_another_error_of_a_reader_passes(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(_: Path) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(hostile, "WEIGHT_FILES", {"empty": lambda target: target.file("x.pth", b"")})
    for reader, failures in ((crash, ["empty: the process ended by SIGKILL"]), (refuse, [])):
        monkeypatch.setattr(hostile, "read_state_dict", reader)
        folder = tmp_path / reader.__name__
        folder.mkdir()
        assert hostile.hostile_files(run, folder, 1).failures == failures
