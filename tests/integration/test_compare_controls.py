"""`scripts/compare_controls.py` on runs of a few steps: what it starts, what it does not repeat, what it tabulates."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "compare_controls.py"
DEBUG_CONFIG = REPOSITORY / "configs" / "debug_cpu.yaml"
TINY = (
    "optim.epochs=1",
    "train.OFFICIAL_EPOCH_LENGTH=2",
    "train.batch_size_per_gpu=2",
    "logging.report=false",
    "logging.tensorboard=false",
    "evaluation.probe=false",
)

Compare = Callable[..., int]


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def started(script: ModuleType, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train in this process instead of in new ones, and return the list that fills with the folders of started runs."""
    folders: list[str] = []

    def call(name: str, *arguments: str) -> None:
        assert name == "dinov2_equi/run/train.py"
        folders.append(Path(arguments[arguments.index("--output-dir") + 1]).name)
        if (code := command(*arguments)) != 0:
            raise RuntimeError(f"code {code}")

    monkeypatch.setattr(script, "_call", call)
    return folders


@pytest.fixture
def compare(script: ModuleType, tmp_path: Path) -> Compare:
    """Run the script on `configs/debug_cpu.yaml`, with further arguments; returns its exit code."""

    def run(*arguments: str) -> int:
        fixed = ["--config", str(DEBUG_CONFIG), "--output-dir", str(tmp_path)]
        return int(script.main([*fixed, *arguments]))

    return run


def comparison(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "comparison.json").read_text())
    assert document["task"] == "compare_controls"
    return dict(document["numbers"])


def equi_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "config.yaml").read_text())["equi"])


def test_each_control_is_trained_with_each_seed_and_tabulated(
    compare: Compare, started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("base", "baseline", "transform_only", "theta")
    assert compare("--controls", *names, "--seeds", "0", "7", *TINY) == 0
    assert started == [f"{name}_seed{seed}" for seed in (0, 7) for name in names]
    rows = comparison(tmp_path)["rows"]
    assert list(rows) == list(names)
    for name in names:
        measure = rows[name]["ssl_loss"]
        assert len(measure["values"]) == 2
        assert measure["mean"] == pytest.approx(statistics.fmean(measure["values"]))
        assert measure["std"] == pytest.approx(statistics.stdev(measure["values"]))
        assert rows[name]["seconds_per_step"]["mean"] > 0
        assert ("equi_loss" in rows[name], "gradient_ratio" in rows[name]) == (name in ("base", "theta"),) * 2
    table = (tmp_path / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(names)
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_ssl_loss_is_the_total_without_the_branch(compare: Compare, started: list[str], tmp_path: Path) -> None:
    overrides = ("equi.loss_weight=100", "logging.metrics_every_steps=1", *TINY)
    assert compare("--controls", "base", "--seeds", "0", *overrides) == 0
    row = comparison(tmp_path)["rows"]["base"]
    last = json.loads((tmp_path / "base_seed0" / "training_metrics.json").read_text().splitlines()[-1])
    ssl = sum(last[name] for name in ("dino_local_crops_loss", "dino_global_crops_loss"))
    ssl += 2 * (last["ibot_loss"] + last["koleo_loss"])
    assert row["ssl_loss"]["mean"] == pytest.approx(ssl, rel=1e-4)  # a difference of larger float32 numbers
    assert row["equi_loss"]["mean"] == pytest.approx(last["equi_loss"])


def test_override_for_every_run_undoes_a_control(compare: Compare, started: list[str], tmp_path: Path) -> None:
    overrides = ("equi.loss_weight=5", "equi.num_steps=3", *TINY)
    assert compare("--controls", "transform_only", "steps_1", "--seeds", "3", *overrides) == 0
    control, steps = equi_of(tmp_path / "transform_only_seed3"), equi_of(tmp_path / "steps_1_seed3")
    assert (control["loss_weight"], control["num_steps"]) == (0.0, 3)
    assert (steps["loss_weight"], steps["num_steps"]) == (5.0, 1)
    assert yaml.safe_load((tmp_path / "steps_1_seed3" / "config.yaml").read_text())["train"]["seed"] == 3


def test_variant_of_ones_own_is_a_row(compare: Compare, started: list[str], tmp_path: Path) -> None:
    variants = ("--variant", "weight_9", "equi.loss_weight=9", "equi.num_steps=1")
    assert compare("--controls", *variants, "--seeds", "0", "--jobs", "1", *TINY) == 0
    assert list(comparison(tmp_path)["rows"]) == ["weight_9"]
    found = equi_of(tmp_path / "weight_9_seed0")
    assert (found["loss_weight"], found["num_steps"]) == (9.0, 1)


def test_further_file_stands_between_configuration_and_control(
    compare: Compare, started: list[str], tmp_path: Path
) -> None:
    further = tmp_path / "further.yaml"
    further.write_text("equi: {num_steps: 4, loss_weight: 2.0}")
    assert compare("--controls", "transform_only", "--seeds", "0", str(further), *TINY) == 0
    found = equi_of(tmp_path / "transform_only_seed0")
    assert (found["loss_weight"], found["num_steps"]) == (0.0, 4)


def test_finished_run_is_repeated(compare: Compare, started: list[str], tmp_path: Path) -> None:
    assert compare("--controls", "base", "--seeds", "0", *TINY) == 0
    first = comparison(tmp_path)["rows"]
    assert compare("--controls", "base", "transform_only", "--seeds", "0", *TINY) == 0
    assert started == ["base_seed0", "transform_only_seed0"]
    assert comparison(tmp_path)["rows"]["base"] == first["base"]


def test_interrupted_run_counts_as_finished(compare: Compare, started: list[str], tmp_path: Path) -> None:
    assert compare("--controls", "base", "--seeds", "0", *TINY) == 0
    (tmp_path / "base_seed0" / "results.json").unlink()
    assert compare("--controls", "base", "--seeds", "0", *TINY) == 0
    assert started == ["base_seed0", "base_seed0"]


def test_run_of_other_settings_is_taken_for_this_one(
    compare: Compare, started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--controls", "base", "--seeds", "0", *TINY) == 0
    assert compare("--controls", "base", "--seeds", "0", *TINY, "equi.loss_weight=3") == 1
    assert started == ["base_seed0", "base_seed0"]  # the training command refuses to go on with it
    assert "FAILED: base, seed 0" in capsys.readouterr().out
    found = comparison(tmp_path)
    assert list(found["failed"]) == ["base_seed0"] and found["rows"] == {}


def test_failed_run_takes_the_others_with_it(
    script: ModuleType, compare: Compare, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = script._call

    def fail_once(name: str, *arguments: str) -> None:
        if "transform_only_seed0" in " ".join(arguments):
            raise RuntimeError("step 3: total_loss = nan")
        train(name, *arguments)

    monkeypatch.setattr(script, "_call", fail_once)
    assert compare("--controls", "transform_only", "base", "--seeds", "0", *TINY) == 1
    found = comparison(tmp_path)
    assert list(found["rows"]) == ["base"]
    assert found["failed"] == {"transform_only_seed0": "step 3: total_loss = nan"}


def test_measured_r2_and_random_weights_are_missing(
    compare: Compare, started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--controls", "base", "transform_only", "--seeds", "0", "1", *TINY)
    assert compare(*arguments) == 0
    for seed in (0, 1):
        for name, score in (("base", 0.5), ("transform_only", 0.2)):
            folder = tmp_path / f"{name}_seed{seed}"
            models = {folder.name: score + seed / 10, f"{folder.name} before training": 0.3}
            numbers = {model: measured(r2) for model, r2 in models.items()}
            (folder / "eval" / "equivariance").mkdir(parents=True)
            (folder / "eval" / "equivariance" / "results.json").write_text(json.dumps({"numbers": numbers}))
    capsys.readouterr()
    assert compare(*arguments) == 0
    rows = comparison(tmp_path)["rows"]
    assert rows["base"]["R2 rotation"]["values"] == [0.5, 0.6]
    assert rows["transform_only"]["R2 blur"]["mean"] == pytest.approx(0.25 + 1)
    assert rows["(random weights)"]["R2 rotation"]["values"] == [0.3, 0.3]  # once for each seed
    out = capsys.readouterr().out
    assert "R2 blur | R2 rotation" in out and "0.550 ± 0.071" in out
    assert compare(*arguments, "--features", "cls") == 0
    assert comparison(tmp_path)["rows"]["base"]["R2 rotation"]["values"] == [0.0, 0.0]
    assert compare(*arguments, "--features", "cls", "both") == 0
    row = comparison(tmp_path)["rows"]["base"]
    assert [row[key]["values"][0] for key in ("R2 rotation", "R2 rotation, both")] == [0.0, 0.5]


def measured(r2: float) -> dict[str, Any]:
    """Return what `eval/equivariance/run.py` writes of a backbone, as far as it is read here."""

    def family(value: float) -> dict[str, Any]:
        return {"r2": {name: {"pooled": {"mean": v}} for name, v in (("cls", 0.0), ("both", value))}}

    return {"families": {"rotation": family(r2), "blur": family(r2 + 1)}}


def test_knn_is_measured_once_for_each_setting(
    script: ModuleType, compare: Compare, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, measured_with = script._call, []

    def call(name: str, *arguments: str) -> None:
        if name != "eval/classification/knn.py":
            return train(name, *arguments)
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        measured_with.append((options["--size"], options["--features"]))
        k = int(options["--k"])
        settings = {name: options[f"--{name}"] for name in ("train", "val", "features")}
        settings |= {"size": int(options["--size"]), "k": [k]}
        document = {"settings": settings, "numbers": {"top1": {str(k): 0.25}}}
        Path(options["--output"]).write_text(json.dumps(document))

    monkeypatch.setattr(script, "_call", call)
    knn = ("--controls", "base", "--seeds", "0", "--knn-train", "a", "--knn-val", "b", "--k", "5", *TINY)
    assert compare(*knn) == compare(*knn) == compare(*knn, "--knn-size", "32") == 0
    assert compare(*knn, "--knn-features", "both") == 0
    assert measured_with == [("64", "cls"), ("32", "cls"), ("64", "both")]
    assert comparison(tmp_path)["rows"]["base"]["knn"]["values"] == [0.25]


def test_probe_is_repeated_or_random_weights_are_probed_beside_every_control(
    script: ModuleType, compare: Compare, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, probed = script._call, []

    def call(name: str, *arguments: str) -> None:
        if name != "eval/equivariance/run.py":
            return train(name, *arguments)
        output = Path(arguments[arguments.index("--output") + 1])
        weights = arguments[1 : arguments.index("--seeds")]
        probed.append([Path(word).name for word in weights])
        folder = Path(weights[0]).name
        scores = {folder: measured(0.5)} | (
            {f"{folder} before training": measured(0.25)} if "random" in weights else {}
        )
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps({"numbers": scores}))

    monkeypatch.setattr(script, "_call", call)
    arguments = ("--controls", "base", "transform_only", "--seeds", "0", *TINY, "--probe")
    first = [["base_seed0", "random"], ["transform_only_seed0"]]
    assert compare(*arguments, "--seeds 0") == compare(*arguments, "--seeds 0") == 0
    assert probed == first
    assert comparison(tmp_path)["rows"]["(random weights)"]["R2 rotation"]["values"] == [0.25]
    assert compare(*arguments, "--seeds 0 1") == 0
    assert probed == first * 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--controls", "transform"), ("transform", "transform_only", "baseline")),
        (("--controls", "base", "--seeds", "one"), ("--seeds", "one")),
        (("--controls", "base", "--seeds", "0", "-1"), ("--seeds", "-1")),
        (("--controls",), ("at least one",)),
        (("--controls", "base", "--variant", "base", "train.seed=1"), ("different names",)),
        (("--variant", "equi.loss_weight=3"), ("--variant", "equi.loss_weight=3")),
        (("--variant", "wide"), ("--variant", "wide")),
        (("--knn-train", "a"), ("--knn-val",)),
    ],
)
def test_wrong_command_is_told_before_anything_starts(
    compare: Compare,
    started: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare(*arguments)
    message = capsys.readouterr().err
    assert [part for part in parts if part not in message] == []
    assert started == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--controls", "base", "--seeds", "0", "equi.famly=se2"),
        ("--controls", "base", "--seeds", "0", "--variant", "wide", "equi.dim=4000"),
        ("--seeds", "0", "--controls", "base", "equi.famly=se2"),
        ("--controls", "base", "--seeds", "5000000000"),
        ("--controls", "base", "--seeds", "0", "no_such.yaml"),
    ],
)
def test_refused_configuration_of_one_row_is_found_after_the_others_were_trained(
    compare: Compare, started: list[str], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert compare(*arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert started == []


def test_every_control_is_a_row_unless_some_are_named(
    script: ModuleType, compare: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(name: str, *arguments: str) -> None:
        raise RuntimeError("not now")

    monkeypatch.setattr(script, "_call", refuse)
    assert compare("--seeds", "0", *TINY) == 1
    names = [path.stem for path in (REPOSITORY / "configs" / "controls").glob("*.yaml")]
    assert sorted(comparison(tmp_path)["failed"]) == sorted(f"{name}_seed0" for name in names)


def test_script_starts_processes_of_its_own(tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]) -> None:
    arguments = ["--config", str(DEBUG_CONFIG), "--output-dir", "out", "--controls", "base", "--seeds", "0"]
    process = start_python(str(SCRIPT), *arguments, "--jobs", "2", *TINY, cwd=tmp_path)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert "| base |" in out
    assert (tmp_path / "out" / "base_seed0" / "teacher_backbone.safetensors").is_file()
