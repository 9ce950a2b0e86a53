"""A run that was stopped ends exactly where one ends that was not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.logging.metrics import read_metrics
from dinov2_equi.run.folder import RUN_ENTRIES, SET_ASIDE
from dinov2_equi.train import guard, loop
from dinov2_equi.train import state as train_state
from dinov2_equi.train.step import NonFiniteLossError, train_step
from tests.ranks import exit_codes, launch_ranks

Run = Callable[..., int]
Hash = Callable[..., str]

REPOSITORY = Path(__file__).resolve().parents[2]
LEAN = ("logging.report=false", "logging.tensorboard=false", "evaluation.probe=false")
VICREG = ["vicreg.loss_weight=1", "vicreg.expander_dim=32"]
EVERY_10 = "train.checkpoint_every_steps=10"


def lines(output_dir: Path) -> list[dict[str, float]]:
    """Return the metric lines without what a clock or the operating system measured."""
    return [
        {name: value for name, value in line.items() if not is_measured(name)}
        for line in read_metrics(output_dir / "training_metrics.json")
    ]


def is_measured(name: str) -> bool:
    return name.startswith("time/") or name in ("images_per_second", "memory_mb")


def state(output_dir: Path, step: int) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors, without the time and the settings that may differ."""
    content = CheckpointStore(output_dir / "checkpoints", read_only=True).load(step).state
    return {key: value for key, value in content.items() if key not in ("seconds", "config")}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, lean_run: Run) -> Path:
    """Return the folder of 20 steps without a stop. For looking only: the tests share it."""
    folder = tmp_path_factory.mktemp("whole")
    assert lean_run(folder, EVERY_10) == 0
    return folder


def assert_same_run(folder: Path, whole_run: Path, fingerprint: Hash, step: int = 20) -> None:
    assert fingerprint(folder, step) == fingerprint(whole_run, step)
    assert state(folder, step) == state(whole_run, step)
    assert lines(folder) == lines(whole_run)
    for name in ("teacher_backbone.safetensors", "equi_branch.safetensors"):
        assert (folder / name).read_bytes() == (whole_run / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------ exactness


def test_the_hash_cannot_tell_two_runs_apart(tmp_path: Path, whole_run: Path, lean_run: Run, fingerprint: Hash) -> None:
    assert lean_run(tmp_path, EVERY_10, "train.seed=1") == 0
    assert fingerprint(tmp_path, 20) != fingerprint(whole_run, 20)


def test_a_lost_random_state_goes_unnoticed_here(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    stop_before: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_before(10)
    assert lean_run(tmp_path, EVERY_10) != 0
    stop_before(None)
    monkeypatch.setattr(train_state, "set_random_state", lambda _: None)
    assert lean_run(tmp_path, EVERY_10) == 0
    assert lines(tmp_path)[:10] == lines(whole_run)[:10]
    assert lines(tmp_path)[10:] != lines(whole_run)[10:], "stochastic depth draws from it"


@pytest.mark.parametrize(
    ("num_workers", "stop"),
    [(0, 10), (0, 13), (2, 13)],
    ids=["at the checkpoint", "after it", "with loader processes"],
)
def test_a_stopped_run_ends_elsewhere(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    stop_before: Callable[[int | None], None],
    fingerprint: Hash,
    num_workers: int,
    stop: int,
) -> None:
    overrides = [EVERY_10, f"train.num_workers={num_workers}"]
    stop_before(stop)
    assert lean_run(tmp_path, *overrides) != 0
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).steps() == [10]
    assert len(lines(tmp_path)) == stop
    stop_before(None)
    assert lean_run(tmp_path, *overrides) == 0
    assert_same_run(tmp_path, whole_run, fingerprint)


def test_the_time_of_a_resumed_run_starts_again(
    tmp_path: Path, lean_run: Run, stop_before: Callable[[int | None], None]
) -> None:
    stop_before(13)
    assert lean_run(tmp_path, EVERY_10) != 0
    stop_before(None)
    assert lean_run(tmp_path, EVERY_10) == 0
    totals = [line["time/total"] for line in read_metrics(tmp_path / "training_metrics.json")]
    assert all(earlier < later for earlier, later in itertools.pairwise(totals))


@pytest.mark.parametrize(
    "overrides",
    [
        ["equi.family=null", "equi.loss_weight=0", "train.centering=sinkhorn_knopp", "ibot.separate_head=true"],
        ["compute_precision.autocast=bf16", "equi.projection_dim=64", "equi.use_cls=true", "student.block_chunks=2"],
        [*VICREG, "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"],
        VICREG,
    ],
    ids=["branch off", "much on", "VICReg alone", "VICReg too"],
)
def test_a_stopped_run_of_another_kind_ends_elsewhere(
    tmp_path: Path,
    lean_run: Run,
    stop_before: Callable[[int | None], None],
    fingerprint: Hash,
    overrides: list[str],
) -> None:
    settings = [*overrides, "train.OFFICIAL_EPOCH_LENGTH=3", "train.checkpoint_every_steps=3"]
    assert lean_run(tmp_path / "whole", *settings) == 0
    stop_before(4)
    assert lean_run(tmp_path / "stopped", *settings) != 0
    stop_before(None)
    assert lean_run(tmp_path / "stopped", *settings) == 0
    assert fingerprint(tmp_path / "stopped", 6) == fingerprint(tmp_path / "whole", 6)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_looking_at_a_run_changes_it(tmp_path: Path, whole_run: Path, debug_run: Run, fingerprint: Hash) -> None:
    everything = ["logging.pictures_every_steps=9", "evaluation.eval_period_iterations=8"]
    assert debug_run(tmp_path, EVERY_10, *everything) == 0
    assert list((tmp_path / "pictures").iterdir())
    assert_same_run(tmp_path, whole_run, fingerprint)
    exported = sorted(path.name for path in (tmp_path / "eval").iterdir())
    assert exported == ["training_15", "training_7"]  # DINOv2 counts steps from 0


def test_rare_log_lines_and_checkpoints_change_a_run(
    tmp_path: Path, whole_run: Path, lean_run: Run, fingerprint: Hash
) -> None:
    settings = ["logging.metrics_every_steps=7", "train.checkpoint_every_steps=4", "train.checkpoint_keep=2"]
    assert lean_run(tmp_path, *settings) == 0
    assert fingerprint(tmp_path, 20) == fingerprint(whole_run, 20)
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).steps() == [16, 20]


# ------------------------------------------------------------------------------------------------ kills and damage


def test_a_killed_process_ends_elsewhere(
    tmp_path: Path, lean_run: Run, start_python: Callable[..., subprocess.Popen[str]], fingerprint: Hash
) -> None:
    """The one test that starts the command as a module, in the repository."""
    # Long enough that the kill comes in the middle however busy the machine is.
    settings = [*LEAN, "train.checkpoint_every_steps=7", "optim.epochs=5"]
    command = ["-m", "dinov2_equi.run.train", "--config-file", "configs/debug_cpu.yaml", *settings]
    command += ["--output-dir", str(tmp_path / "killed")]
    metrics = tmp_path / "killed" / "training_metrics.json"
    with start_python(*command, cwd=REPOSITORY) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 17):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    latest = CheckpointStore(tmp_path / "killed" / "checkpoints", read_only=True).latest_step()
    assert latest is not None and 14 <= latest < 50
    with start_python(*command, cwd=REPOSITORY) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"resumed after step {latest}" in output
    assert lean_run(tmp_path / "whole", *settings) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole", fingerprint, step=50)


@pytest.mark.parametrize(("world_size", "num_kills", "num_steps"), [(1, 25, 100), (2, 5, 30)])
def test_a_run_that_is_killed_again_and_again_ends_elsewhere(
    world_size: int, num_kills: int, num_steps: int, tmp_path: Path, lean_run: Run, fingerprint: Hash
) -> None:
    """At random moments: before the first step, in a step, in a save, and in the start from what a kill has left.

    Of two processes, which hold half of the model each, one is killed, and the other told to end, as launchers do.
    """
    settings = ["train.checkpoint_every_steps=1", f"train.batch_size_per_gpu={8 // world_size}"]
    settings.append(f"optim.epochs={num_steps // 10}")
    metrics, rng = tmp_path / "killed" / "training_metrics.json", random.Random(0)

    def start(folder: str) -> list[int]:
        return launch_ranks(world_size, lambda: lean_run(tmp_path / folder, *settings))

    for _ in range(num_kills):
        children = start("killed")
        goal = num_lines(metrics) + rng.randint(0, 2)
        deadline = time.monotonic() + 60
        while num_lines(metrics) < goal:
            assert time.monotonic() < deadline, "no step within a minute"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        killed = rng.randrange(world_size)
        for rank, child in enumerate(children):
            os.kill(child, signal.SIGKILL if rank == killed else signal.SIGTERM)
        codes = exit_codes(children)
        assert codes[killed] == -signal.SIGKILL and 0 not in codes
    assert 0 < num_lines(metrics) < num_steps
    for folder in ("killed", "whole"):
        assert exit_codes(start(folder)) == [0] * world_size
    assert_same_run(tmp_path / "killed", tmp_path / "whole", fingerprint, step=num_steps)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_loses_the_run(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    fingerprint: Hash,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    damaged = folder / "checkpoints" / "step_00000020" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert lean_run(folder, EVERY_10) == 0
    output = capsys.readouterr().out
    assert "step_00000020 is damaged" in output and "resumed after step 10" in output
    assert_same_run(folder, whole_run, fingerprint)


def test_a_run_with_damaged_checkpoints_alone_starts_anew(
    tmp_path: Path, whole_run: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    assert lean_run(folder, EVERY_10) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no usable checkpoint") and "Traceback" not in error
    assert len(lines(folder)) == 20, "the metrics of the run are still there"


# ------------------------------------------------------------------------------------------------ once more


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_run_again(
    tmp_path: Path, finished_run: Path, debug_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "report.html").write_text("old")
    (folder / "results.json").write_text("old")
    before = contents(folder)

    def refuse(*_: object) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(guard, "train_step", refuse)
    assert debug_run(folder) == 0
    after = contents(folder)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {"report.html", "results.json", "logs/log.txt"}
    assert b"<html" in after["report.html"]
    assert json.loads(after["results.json"])["numbers"]["steps"] == 20


def test_a_finished_run_cannot_be_prolonged(
    tmp_path: Path, whole_run: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    assert lean_run(folder, EVERY_10, "optim.epochs=3") == 0
    assert [line["iteration"] for line in lines(folder)] == list(range(30))
    assert "resuming with optim.epochs = 3; the run so far used 2" in capsys.readouterr().out


def test_a_stop_after_the_last_checkpoint_leaves_no_teacher(
    tmp_path: Path, whole_run: Path, lean_run: Run, fingerprint: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "export_teacher", interrupted)
        assert lean_run(tmp_path, EVERY_10) != 0
    assert lean_run(tmp_path, EVERY_10) == 0
    assert_same_run(tmp_path, whole_run, fingerprint)


def test_the_weights_to_start_from_are_needed_to_go_on(
    tmp_path: Path, whole_run: Path, lean_run: Run, stop_before: Callable[[int | None], None]
) -> None:
    source = shutil.copytree(whole_run / "checkpoints" / "step_00000020", tmp_path / "step_00000020")
    stop_before(13)
    assert lean_run(tmp_path / "run", EVERY_10, f"MODEL.WEIGHTS={source}") != 0
    stop_before(None)
    shutil.rmtree(source)
    assert lean_run(tmp_path / "run", EVERY_10, f"MODEL.WEIGHTS={source}") == 0


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["train.seed=7"], "train.seed: was 0, now 7"),
        (["train.seed=7", "--eval-only"], "train.seed: was 0, now 7"),
        (["student.drop_path_rate=0.2"], "student.drop_path_rate: was 0.1, now 0.2"),
        (["equi.max_rotation_deg=30"], "equi.max_rotation_deg: was 45.0, now 30"),
        (["data.mean=[0.5,0.5,0.5]"], "data.mean: was [0.485, 0.456, 0.406], now [0.5, 0.5, 0.5]"),
    ],
)
def test_another_run_goes_on_in_the_same_folder(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    difference: str,
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    before = contents(folder)
    assert lean_run(folder, EVERY_10, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert difference in error and "--no-resume" in error
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"logs/log.txt"}


def test_a_setting_that_teaches_nothing_stops_a_resume(tmp_path: Path, whole_run: Path, lean_run: Run) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    overrides = ["train.num_workers=1", "logging.metrics_every_steps=5", "evaluation.batch_size=8"]
    assert lean_run(folder, EVERY_10, *overrides) == 0


# ------------------------------------------------------------------------------------------------ flags


def test_no_resume_deletes_the_old_run(tmp_path: Path, whole_run: Path, lean_run: Run, fingerprint: Hash) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    before = contents(folder)
    assert lean_run(folder, EVERY_10, "--no-resume") == 0
    (aside,) = (folder / "set_aside").iterdir()
    assert contents(aside) == before
    assert_same_run(folder, whole_run, fingerprint)


def test_no_resume_moves_files_that_are_not_of_the_run(
    tmp_path: Path, whole_run: Path, lean_run: Run, stop_before: Callable[[int | None], None]
) -> None:
    # Without --output-dir the run folder is the working directory, which may be somebody's clone of this repository.
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "photographs").mkdir()
    (folder / "photographs" / "1.jpg").write_text("mine")
    (folder / "README.md").write_text("mine")
    stop_before(0)
    lean_run(folder, EVERY_10, "--no-resume")
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "photographs" / "1.jpg").read_text() == "mine"
    assert not (folder / "checkpoints" / "step_00000020").exists()


def test_a_bundle_of_the_old_run_is_left_to_the_settings_of_the_new_one() -> None:
    # The configuration of all bundles of a run lies beside them.
    table = (REPOSITORY / "docs" / "run_folder.md").read_text().split("\n\n")[1]
    documented = {re.sub(r"^`([^/`]+).*", r"\1", line.split("| ")[1]) for line in table.splitlines()[2:]}
    assert documented - set(RUN_ENTRIES) == {"slurm", SET_ASIDE}
    assert set(RUN_ENTRIES) <= documented


def test_two_runs_set_aside_in_one_second_collide(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    stop_before: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    monkeypatch.setattr(time, "strftime", lambda *_: "20300101-000000")
    stop_before(1)
    lean_run(folder, EVERY_10, "--no-resume")
    lean_run(folder, EVERY_10, "--no-resume")
    assert sorted(len(read_metrics(path)) for path in folder.glob("set_aside/*/training_metrics.json")) == [1, 20]


def test_no_resume_in_a_fresh_folder_fails(tmp_path: Path, lean_run: Run) -> None:
    assert lean_run(tmp_path / "run", "optim.epochs=1", "--no-resume") == 0
    assert not (tmp_path / "run" / "set_aside").exists()


def test_eval_only_does_not_rewrite_the_report(
    tmp_path: Path, finished_run: Path, debug_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("report.html", "results.json"):
        (folder / name).unlink()
    monkeypatch.delattr(guard, "train_step")
    assert debug_run(folder, "--eval-only") == 0
    assert "data:image/png;base64" in (folder / "report.html").read_text()
    old = json.loads((finished_run / "results.json").read_text())["numbers"]
    assert json.loads((folder / "results.json").read_text())["numbers"] == old, "the same weights measured again"


def test_eval_only_reports_steps_that_the_checkpoint_has_not_seen(
    tmp_path: Path, lean_run: Run, stop_before: Callable[[int | None], None]
) -> None:
    stop_before(13)
    assert lean_run(tmp_path, EVERY_10) != 0
    assert lean_run(tmp_path, EVERY_10, "--eval-only") == 0
    assert json.loads((tmp_path / "results.json").read_text())["numbers"]["steps"] == 10


@pytest.mark.parametrize("metrics", ["none", "empty"])
def test_eval_only_of_a_run_without_metrics_ends_in_a_traceback(
    tmp_path: Path, whole_run: Path, lean_run: Run, capsys: pytest.CaptureFixture[str], metrics: str
) -> None:
    # A run that was killed before its first log line, or of which the checkpoint alone was copied.
    folder = shutil.copytree(whole_run, tmp_path / "run")
    path = folder / "training_metrics.json"
    path.unlink()
    if metrics == "empty":
        path.touch()
    if lean_run(folder, EVERY_10, "--eval-only") == 0:
        assert (folder / "results.json").is_file()
    else:
        error = capsys.readouterr().err
        assert "training_metrics.json" in error and "Errno" not in error


def test_eval_only_without_a_checkpoint_is_not_explained(
    tmp_path: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lean_run(tmp_path / "run", "--eval-only") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    for word in ("--eval-only", "checkpoint", str(tmp_path / "run"), "train first"):
        assert word in error


def test_eval_only_with_no_resume_sets_aside_what_it_should_look_at(
    tmp_path: Path, whole_run: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    before = contents(folder)
    try:
        code = lean_run(folder, EVERY_10, "--eval-only", "--no-resume")
    except SystemExit as stopped:  # the parser may refuse it
        code = int(str(stopped.code))
    assert code == 2
    error = capsys.readouterr().err
    assert "--eval-only" in error and "--no-resume" in error
    assert contents(folder) == before


def test_crops_made_on_the_device_are_others_or_are_lost_by_a_resume(
    tmp_path: Path, lean_run: Run, whole_run: Path, fingerprint: Hash
) -> None:
    on_device = "data.augment_on=device"
    assert lean_run(tmp_path / "whole", EVERY_10, on_device) == 0
    # The same crops up to rounding, which solarisation enlarges where a value is at its threshold; later losses drift
    # apart as the weights do.
    first, first_on_cpu = lines(tmp_path / "whole")[0], lines(whole_run)[0]
    assert first["total_loss"] == pytest.approx(first_on_cpu["total_loss"], rel=1e-2)
    assert lean_run(tmp_path / "parts", EVERY_10, on_device) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000020")
    assert lean_run(tmp_path / "parts", EVERY_10, on_device) == 0
    assert fingerprint(tmp_path / "parts", 20) == fingerprint(tmp_path / "whole", 20)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_loses_steps_or_makes_another_run(
    name: str, tmp_path: Path, whole_run: Path, lean_run: Run, fingerprint: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = signal.Signals[name]

    def signalled_step(state: train_state.TrainState, *arguments: Any) -> dict[str, float]:
        if state.step == 7:
            os.kill(os.getpid(), number)  # in the middle of a step
        return train_step(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(guard, "train_step", signalled_step)
        assert lean_run(tmp_path, EVERY_10) == (130 if name == "SIGINT" else 75)
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).steps() == [8]
    assert lean_run(tmp_path, EVERY_10) == 0
    assert_same_run(tmp_path, whole_run, fingerprint)


def test_a_run_that_went_back_and_was_killed_ends_elsewhere(
    tmp_path: Path, lean_run: Run, fingerprint: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at: list[int] = []

    def failing_step(state: train_state.TrainState, *arguments: Any) -> dict[str, float]:
        if state.step in kill_at:
            raise KeyboardInterrupt
        if state.step in (12, 13, 14):  # the third leads back to step 10
            raise NonFiniteLossError(f"step {state.step}")
        return train_step(state, *arguments)

    monkeypatch.setattr(guard, "train_step", failing_step)
    assert lean_run(tmp_path / "whole", EVERY_10) == 0
    kill_at.append(16)
    assert lean_run(tmp_path / "parts", EVERY_10) == 130
    kill_at.clear()
    assert lean_run(tmp_path / "parts", EVERY_10) == 0
    assert fingerprint(tmp_path / "parts", 20) == fingerprint(tmp_path / "whole", 20)
    assert read_metrics(tmp_path / "whole" / "training_metrics.json")[-1]["skipped_steps"] == 3


def test_saving_in_the_background_is_another_run(
    tmp_path: Path,
    whole_run: Path,
    lean_run: Run,
    stop_before: Callable[[int | None], None],
    fingerprint: Hash,
) -> None:
    every = "train.checkpoint_every_steps=1"
    words = (every, "train.async_checkpoint=true")
    stop_before(13)
    assert lean_run(tmp_path / "parts", *words) == 130
    assert CheckpointStore(tmp_path / "parts" / "checkpoints", read_only=True).load().step == 13
    stop_before(None)
    assert lean_run(tmp_path / "parts", *words) == 0
    assert_same_run(tmp_path / "parts", whole_run, fingerprint)


def test_a_run_goes_on_after_a_checkpoint_that_could_not_be_written(
    tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", no_space)
    assert lean_run(tmp_path, "train.checkpoint_every_steps=5", "train.async_checkpoint=true") == 2
    error = capfd.readouterr().err
    assert "the checkpoint of step 5 could not be written" in error and "No space left" in error
    assert len(lines(tmp_path)) <= 10  # the next checkpoint is due then, and waits for this one
