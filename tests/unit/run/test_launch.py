"""The command of a SLURM job: what is asked for, what is refused, what the job uses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.config.schema import Config
from dinov2_equi.run import launch
from dinov2_equi.run.launch import Allocation, allocation_of, is_for_slurm


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [(), ("--launcher", "inline")])
def test_a_plain_command_is_submitted(words: tuple[str, ...]) -> None:
    assert not is_for_slurm(parse(*words))


@pytest.mark.parametrize(
    "words", [("--launcher", "slurm"), ("--nodes", "2"), ("--partition", "p"), ("--slurm", "account=x")]
)
def test_an_option_of_slurm_is_ignored(words: tuple[str, ...]) -> None:
    assert is_for_slurm(parse(*words))


def test_inline_takes_options_of_slurm() -> None:
    with pytest.raises(ValueError, match="inline"):
        is_for_slurm(parse("--launcher", "inline", "--nodes", "2"))


def test_a_gpu_has_no_process_of_its_own() -> None:
    asked = parse("--nodes", "4", "--gpus-per-node", "8", "--time", "3-00:00:00", "--slurm", "account=x", "qos=y")
    assert allocation_of(asked) == Allocation(
        nodes=4, tasks_per_node=8, gpus_per_node=8, time="3-00:00:00", further={"account": "x", "qos": "y"}
    )
    assert allocation_of(parse("--launcher", "slurm")) == Allocation()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--nodes", "0"), "--nodes must be at least 1, got 0"), (("--slurm", "account"), "option=value, got account")],
)
def test_faulty_options_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocation_of(parse(*words))


class RecordingExecutor:
    """Stands in for submitit's."""

    parameters: dict[str, Any]
    job: launch.TrainJob

    def __init__(self, folder: Path) -> None:
        type(self).parameters = {"folder": folder}

    def update_parameters(self, **parameters: Any) -> None:
        type(self).parameters |= parameters

    def submit(self, job: launch.TrainJob) -> Any:
        type(self).job = job
        return argparse.Namespace(job_id=17)


def test_the_job_uses_what_is_edited_later_or_guesses_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submitit.SlurmExecutor", RecordingExecutor)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    for _ in range(2):  # a second time over the first
        assert launch.submit(Config(), tmp_path, Allocation(nodes=2), flags=["--eval-only"]) == "17"
    code = tmp_path / "slurm" / "code"
    assert (code / "dinov2_equi" / "run" / "train.py").is_file()
    asked = RecordingExecutor.parameters
    assert str(code) in asked["setup"][0]
    assert asked["additional_parameters"] == {"requeue": True}
    assert not {"partition", "time", "gpus_per_node", "cpus_per_task"} & asked.keys()
    arguments = RecordingExecutor.job.arguments
    assert arguments[:2] == ["--launcher", "inline"] and arguments[-1] == "--eval-only"
    assert Path(arguments[arguments.index("--config-file") + 1]) == tmp_path / "slurm" / "config.yaml"


def test_a_machine_without_slurm_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match="sbatch was not found"):
        launch.submit(Config(), tmp_path, Allocation())
