"""The command of a SLURM job: what is asked for, what is refused, what the job uses."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from submitit.core.utils import FailedJobError

from dinov2_equi.config.schema import Config
from dinov2_equi.distributed.setup import Launch
from dinov2_equi.run import launch
from dinov2_equi.run.launch import Allocation, allocation_of, is_for_slurm
from dinov2_equi.run.train import main


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
    assert allocation_of(parse("--signal-delay", "600")) == Allocation(signal_delay_s=600)
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
    job: launch.CommandJob
    jobs: ClassVar[list[launch.CommandJob]] = []

    def __init__(self, folder: Path, python: str) -> None:
        assert Path(python.split()[-1]).is_file()
        type(self).parameters = {"folder": folder}

    def update_parameters(self, **parameters: Any) -> None:
        type(self).parameters |= parameters

    def submit(self, job: launch.CommandJob) -> Any:
        type(self).job = job
        type(self).jobs.append(job)
        return argparse.Namespace(job_id=17)

    def batch(self) -> Any:
        type(self).jobs = []
        return contextlib.nullcontext()


def test_the_job_uses_what_is_edited_later_or_guesses_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submitit.SlurmExecutor", RecordingExecutor)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    for _ in range(2):  # the second one beside the first, whose job may still run
        assert launch.submit(Config(), tmp_path, Allocation(nodes=2), flags=["--eval-only"]) == "17"
    scripts = list(tmp_path.glob("slurm/submitted_*/code/dinov2_equi/run/train.py"))
    assert len(scripts) == 2
    config = Path(RecordingExecutor.job.arguments[1])
    code = config.parent / "code"
    assert code in [script.parents[2] for script in scripts] and config.name == "config.yaml" and config.is_file()
    asked = RecordingExecutor.parameters
    assert asked["setup"] == [f"cd {code}", f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"]
    assert asked["additional_parameters"] == {"requeue": True}
    assert not {"partition", "time", "gpus_per_node", "cpus_per_task"} & asked.keys()
    arguments = RecordingExecutor.job.arguments
    assert arguments[0] == "--config-file" and arguments[-3:] == ["--eval-only", "--launcher", "inline"]


def test_a_machine_without_slurm_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match="sbatch was not found"):
        launch.submit(Config(), tmp_path, Allocation())


def eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="*")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    launch.add_arguments(parser)
    return parser


def run_launched(words: list[str], ran: list[str], check: Callable[[argparse.Namespace], None] | None = None) -> int:
    def command(args: argparse.Namespace) -> int:
        ran.append(args.device)
        return 0

    script = launch.ROOT / "eval" / "depth" / "run.py"
    return launch.run_launched(
        command, eval_parser(), words, script=script, check=check or (lambda args: None), interrupted="stopped"
    )


def test_a_harness_is_submitted_with_its_options_of_slurm_or_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("submitit.SlurmExecutor", RecordingExecutor)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    config = tmp_path / "mine.yaml"
    config.write_text("steps: 3\n")
    output = tmp_path / "out"
    words = ["--config", str(config), "--nodes", "2", "--set", "a=1", "b=2", "--part", "p", "--slurm", "account=x"]
    ran: list[str] = []
    # CUDA on this machine is not asked for: the job runs on others.
    assert run_launched([*words, "--device", "cuda:7", "--output", str(output)], ran) == 0
    assert not ran and "job 17 was submitted; its log: " in capsys.readouterr().out
    (copy,) = output.glob("slurm/submitted_*/config.yaml")
    kept = ["--config", str(config), "--set", "a=1", "b=2", "--device", "cuda:7", "--output", str(output)]
    assert RecordingExecutor.job.arguments == [
        *kept, "--output", str(output), "--config", str(copy), "--launcher", "inline",
    ]  # fmt: skip
    assert RecordingExecutor.parameters["partition"] == "p"
    assert copy.read_text() == "steps: 3\n"
    assert (copy.parent / "code" / RecordingExecutor.job.script).is_file()


def test_a_partition_that_slurm_does_not_know_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed"

    class RefusingExecutor(RecordingExecutor):
        def submit(self, job: launch.CommandJob) -> Any:
            raise FailedJobError(said)

        @contextlib.contextmanager
        def batch(self) -> Any:  # jobs of an array are submitted at its end
            yield
            raise FailedJobError(said)

    monkeypatch.setattr("submitit.SlurmExecutor", RefusingExecutor)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    sweep = tmp_path / "a.yaml"
    sweep.write_text("train:\n  seed: 1\n")
    debug = ["--config-file", str(launch.ROOT / "configs" / "debug_cpu.yaml"), "--output-dir", str(tmp_path / "out")]
    assert main([*debug, "--partition", "nope"]) == 2
    assert main([*debug, "--partition", "nope", "--sweep", str(sweep)]) == 2
    assert run_launched(["--partition", "nope", "--output", str(tmp_path / "out")], []) == 2
    shown = "error: SLURM does not accept the job: " + said.replace("\n", "; ") + "\n"
    assert capsys.readouterr().err == shown * 3


def test_a_fault_that_a_harness_could_see_waits_in_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(_: argparse.Namespace) -> None:
        raise ValueError("there is no folder nowhere")

    assert run_launched(["--nodes", "2", "--output", str(tmp_path)], [], check) == 2
    assert capsys.readouterr().err == "error: there is no folder nowhere\n"


def test_a_harness_here_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []
    assert run_launched([], ran) == 0 and ran == ["cpu"]
    assert run_launched(["--device", "cuda:99"], ran) == 2 and ran == ["cpu"]
    assert "CUDA devices" in capsys.readouterr().err


def test_a_process_has_the_device_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    second = Launch(world_size=4, rank=3, local_rank=1)
    assert launch.device_of("cuda", second) == "cuda:1" and launch.device_of("cpu", second) == "cpu"
    assert launch.device_of("cuda:1", Launch()) == "cuda:1"
    with pytest.raises(ValueError, match="give --device cuda"):
        launch.device_of("cuda:1", second)
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        launch.device_of("cuda", Launch(world_size=3, rank=2, local_rank=2))


def test_an_array_mixes_up_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("submitit.SlurmExecutor", RecordingExecutor)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    files = {seed: tmp_path / f"seed_{seed}.yaml" for seed in (4, 5)}
    for seed, file in files.items():
        file.write_text(f"train:\n  seed: {seed}\n")
    debug = ["--config-file", str(launch.ROOT / "configs" / "debug_cpu.yaml"), "--output-dir", str(tmp_path / "out")]
    assert main([*debug, "--sweep", *map(str, files.values()), "optim.epochs=3", "--time", "10"]) == 0
    for job, (seed, file) in zip(RecordingExecutor.jobs, files.items(), strict=True):
        folder = tmp_path / "out" / file.stem
        assert job.arguments[job.arguments.index("--output-dir") + 1] == str(folder)
        (copy,) = folder.glob("slurm/submitted_*/config.yaml")
        text = copy.read_text()
        assert f"seed: {seed}\n" in text and "epochs: 3\n" in text
    (code,) = tmp_path.glob("out/slurm/submitted_*/code")
    assert str(code) in RecordingExecutor.parameters["setup"][0]
    assert capsys.readouterr().out.count("was submitted for") == 2


def test_runs_are_set_aside_though_another_of_the_array_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("")
    files[1].write_text("train:\n  dataset_path: /nowhere\n")
    old = tmp_path / "out" / "a" / "config.yaml"
    old.parent.mkdir(parents=True)
    old.write_text("")
    debug = ["--config-file", str(launch.ROOT / "configs" / "debug_cpu.yaml"), "--output-dir", str(tmp_path / "out")]
    assert main([*debug, "--no-resume", "--sweep", *map(str, files)]) == 2
    assert "/nowhere" in capsys.readouterr().err and old.is_file()


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (("a", "c"), ("--launcher", "inline"), "--sweep submits an array of SLURM jobs"),
        (("a", "b/a"), (), "must differ from each other and from slurm, got a, a"),
        (("a", "slurm"), (), "must differ from each other and from slurm, got a, slurm"),
        ((), ("optim.epochs=3",), "--sweep takes YAML files, got optim.epochs=3"),
    ],
)
def test_an_array_that_cannot_be_told_apart_or_run_is_submitted(
    names: tuple[str, ...], words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    files = [tmp_path / f"{name}.yaml" for name in names]
    for file in files:
        file.write_text("")
    assert main(["--output-dir", str(tmp_path), "--sweep", *map(str, files), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_runs_of_an_array_end_up_below_the_folder_of_one_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(f"train:\n  output_dir: {tmp_path / file.stem}\n")
    assert main(["--sweep", *map(str, files)]) == 2
    assert "give the folder of all by --output-dir" in capsys.readouterr().err
