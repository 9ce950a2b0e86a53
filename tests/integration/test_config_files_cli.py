"""Several configuration files on the training command's line: merged, saved, and resumed from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Run = Callable[..., int]
REPOSITORY = Path(__file__).resolve().parents[2]
DEBUG_CONFIG = str(REPOSITORY / "configs" / "debug_cpu.yaml")
LEAN = ("logging.report=false", "logging.tensorboard=false", "evaluation.probe=false", "train.OFFICIAL_EPOCH_LENGTH=2")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    path = tmp_path / "second.yaml"
    path.write_text("equi: {num_steps: 3}\noptim: {warmup_epochs: 0}\n")
    return path


def saved(folder: Path) -> dict[str, dict[str, object]]:
    return dict(yaml.safe_load((folder / "config.yaml").read_text()))


def test_second_file_and_overrides_may_follow_in_any_order(tmp_path: Path, second: Path, command: Run) -> None:
    folder = tmp_path / "run"
    words = ("--config-file", DEBUG_CONFIG, str(second), "--output-dir", str(folder), *LEAN, "equi.dim=8")
    assert command(*words) == 0
    assert (saved(folder)["equi"]["num_steps"], saved(folder)["equi"]["dim"]) == (3, 8)
    assert (saved(folder)["optim"]["warmup_epochs"], saved(folder)["optim"]["epochs"]) == (0, 2)
    assert command(*LEAN, "equi.dim=8", "--output-dir", str(folder), str(second), "--config-file", DEBUG_CONFIG) == 0


def test_interrupted_run_of_two_files_goes_on(
    tmp_path: Path,
    second: Path,
    command: Run,
    stop_before: Callable[[int | None], None],
    fingerprint: Callable[..., str],
) -> None:
    words = ("--config-file", DEBUG_CONFIG, str(second), *LEAN, "train.checkpoint_every_steps=1", "--output-dir")
    assert command(*words, str(tmp_path / "whole")) == 0
    stop_before(2)
    assert command(*words, str(tmp_path / "parts")) == 130
    stop_before(None)
    assert command(*words, str(tmp_path / "parts")) == 0
    assert fingerprint(tmp_path / "parts", 4) == fingerprint(tmp_path / "whole", 4)


def test_resolved_file_alone_is_the_same_run(
    tmp_path: Path, second: Path, command: Run, fingerprint: Callable[..., str]
) -> None:
    assert command("--config-file", DEBUG_CONFIG, str(second), *LEAN, "--output-dir", str(tmp_path / "first")) == 0
    resolved = tmp_path / "first" / "config.yaml"
    assert command("--config-file", str(resolved), "--output-dir", str(tmp_path / "again")) == 0
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "first")


@pytest.mark.parametrize(
    ("content", "part"),
    [("equi: {num_stps: 3}", "second.yaml: unknown key 'equi.num_stps'"), (None, "no_such.yaml: no such file")],
)
def test_fault_in_the_second_file_is_blamed_on_the_first(
    tmp_path: Path, second: Path, command: Run, capsys: pytest.CaptureFixture[str], content: str | None, part: str
) -> None:
    if content is None:
        second = tmp_path / "no_such.yaml"
    else:
        second.write_text(content)
    assert command("--config-file", DEBUG_CONFIG, str(second), "--output-dir", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert part in message
    assert "debug_cpu" not in message
    assert not (tmp_path / "run").exists()
