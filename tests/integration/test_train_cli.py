"""The training command as a user types it: what it leaves behind, and what it says when something is wrong."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.hub.equi_backbone import SplitFeatures
from dinov2_equi.logging.metrics import read_metrics
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.weights import load_exact, read_state_dict
from dinov2_equi.run.load import load_eval_model
from dinov2_equi.train import build, loop
from dinov2_equi.train.build_model import has_split
from dinov2_equi.train.export import export_teacher
from dinov2_equi.train.settings import load_run_config
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "dinov2_equi" / "run" / "train.py"
LAST_STEP = 19

"""Marks a known fault; `reason` says what is wrong."""

LEFT_BEHIND = (
    "report.html",
    "results.json",
    "training_metrics.json",
    "teacher_checkpoint.pth",
    "teacher_backbone.safetensors",
    "equi_branch.safetensors",
    "config.yaml",
    "logs/log.txt",
    "checkpoints/step_00000020/manifest.json",
)
LOSSES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "equi_loss", "total_loss")
FACTS = ("lr", "wd", "mom", "last_layer_lr", "teacher_temp", "time/data", "time/step", "time/total", "memory_mb")


@pytest.fixture
def load(make_config: Callable[..., Config]) -> Callable[[Path], Config]:
    """Return a function that reads a configuration file."""
    return lambda path: make_config(config_file=path)


# ------------------------------------------------------------------------------------------------ real processes


def test_the_file_does_not_run_from_another_folder(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]], load: Callable[[Path], Config]
) -> None:
    # Overrides before, between and after the flags.
    arguments = ["train.seed=3", "--config-file", str(REPOSITORY / "configs" / "debug_cpu.yaml"), "optim.epochs=1"]
    arguments += ["--output-dir", "run", "equi.num_steps=3"]
    with start_python(str(SCRIPT), *arguments, cwd=tmp_path) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    for name in (*LEFT_BEHIND[:-1], "checkpoints/step_00000010/manifest.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert str(tmp_path / "run" / "report.html") in output
    cfg = load(tmp_path / "run" / "config.yaml")
    assert (cfg.train.seed, cfg.optim.epochs, cfg.equi.num_steps) == (3, 1, 3)
    assert errors == "", "a good run has nothing to complain about"


def test_a_missing_image_folder_ends_in_a_traceback(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = ["--config-file", str(REPOSITORY / "configs" / "vitl14_equi.yaml"), "--output-dir", "run"]
    with start_python(str(SCRIPT), *arguments, cwd=tmp_path) as process:
        output, errors = process.communicate(timeout=120)  # importing torch on a busy machine
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "Traceback" not in errors and "data/imagenet22k" in errors and str(tmp_path) in errors
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_file_of_the_run_is_missing(finished_run: Path) -> None:
    for name in LEFT_BEHIND:
        assert (finished_run / name).stat().st_size > 0, name
    assert list((finished_run / "tensorboard").iterdir())
    unfinished = [path.name for path in finished_run.rglob("*") if path.suffix in (".tmp", ".partial")]
    assert not unfinished


def test_the_teacher_checkpoint_has_another_layout_than_dinov2s(finished_run: Path) -> None:
    content = torch.load(finished_run / "teacher_checkpoint.pth", weights_only=True)
    assert set(content) == {"teacher"}
    names = set(content["teacher"])
    assert {name.split(".")[0] for name in names} == {"backbone", "dino_head", "feature_split"}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= names
    assert {"dino_head.mlp.0.weight", "dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"} <= names


def test_an_exported_backbone_differs_from_the_teachers(finished_run: Path) -> None:
    teacher = torch.load(finished_run / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    for name in ("teacher_checkpoint.pth", "teacher_backbone.safetensors"):
        backbone = build_backbone("vit_test_tiny", img_size=32, patch_size=8, init_values=1e-5)
        load_exact(backbone, read_state_dict(finished_run / name))
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, teacher[f"backbone.{key}"]), (name, key)


def test_torch_hub_does_not_load_what_a_run_exports(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    # The smallest architecture that has an entry point; blocks in groups, whose names differ from the released ones.
    cfg = make_config(
        "student.arch=vit_small",
        "student.patch_size=16",
        "student.block_chunks=4",
        "equi.projection_dim=64",
        "equi.dim=24",
        "equi.layer=5",
    )
    export_teacher(SSLMetaArch(cfg), tmp_path)
    names = load_file(tmp_path / "teacher_backbone.safetensors")
    assert "blocks.11.norm1.weight" in names and "blocks.0.0.norm1.weight" not in names
    image = torch.rand(1, 3, 32, 48)  # not square
    outputs = []
    for name in ("teacher_checkpoint.pth", "teacher_backbone.safetensors"):
        weights = tmp_path / name
        model = torch.hub.load(str(REPOSITORY), "dinov2_equi_vits16", source="local", weights=weights)
        outputs.append(model(image))
        if name == "teacher_checkpoint.pth":
            check_halves(model.split_features(image), load_eval_model(str(weights)), image)
        weights.unlink()  # 90 MB each
    assert outputs[0].shape == (1, 384) and outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def check_halves(parts: SplitFeatures, model: EvalModel, image: torch.Tensor) -> None:
    """Compare the parts of one normalised image with the halves that the evaluation reads from the same file."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    halves = model.features(image * std + mean, device="cpu")
    for name in ("invariant", "equivariant"):
        cls, patches = getattr(parts, f"{name}_clstoken"), getattr(parts, f"{name}_patchtokens")
        torch.testing.assert_close(torch.cat([cls, patches.mean(dim=1)], dim=1), halves[name], rtol=0, atol=1e-5)
    assert halves["equivariant"].shape == (1, 2 * 24)


def test_the_exported_teacher_is_not_the_one_of_the_last_checkpoint(finished_run: Path) -> None:
    teacher = torch.load(finished_run / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    saved = load_file(finished_run / "checkpoints" / "step_00000020" / "model.safetensors")
    record = {f"feature_split.{name}": teacher.pop(f"feature_split.{name}").item() for name in ("equi_dim", "block")}
    assert record == {"feature_split.equi_dim": 12, "feature_split.block": -1}
    assert {f"teacher.{name}" for name in teacher} == {name for name in saved if name.startswith("teacher.")}
    for name, value in teacher.items():
        assert torch.equal(value, saved[f"teacher.{name}"]), name
    decoder = load_file(finished_run / "equi_branch.safetensors")
    assert {f"equi.{name}" for name in decoder} == {name for name in saved if name.startswith("equi.")}


def test_a_metric_line_lacks_a_value(finished_run: Path) -> None:
    lines = read_metrics(finished_run / "training_metrics.json")
    assert [line["iteration"] for line in lines] == list(range(LAST_STEP + 1))
    norms = ("grad_norm/backbone", "grad_norm/dino_head", "grad_norm/equi_decoder")
    for line in lines:
        for name in (*LOSSES, *FACTS, *norms, "images_per_second"):
            assert math.isfinite(line[name]), name
        assert line["time/data"] <= line["time/step"]
        assert line["images_per_second"] == pytest.approx(4 / line["time/step"])
    totals = [line["time/total"] for line in lines]
    assert totals == pytest.approx(np.cumsum([line["time/step"] for line in lines]).tolist())


def test_the_logged_terms_do_not_add_up_to_the_logged_total(finished_run: Path) -> None:
    # The weights of the debug configuration: all 1; DINOv2 optimises twice the logged KoLeo and iBOT terms.
    for line in read_metrics(finished_run / "training_metrics.json"):
        expected = line["dino_local_crops_loss"] + line["dino_global_crops_loss"] + line["equi_loss"]
        expected += 2 * line["koleo_loss"] + 2 * line["ibot_loss"]
        assert line["total_loss"] == pytest.approx(expected, rel=1e-5)  # float32 sums of a few terms


def test_a_logged_schedule_value_is_not_the_configured_one(finished_run: Path, load: Callable[[Path], Config]) -> None:
    lines = read_metrics(finished_run / "training_metrics.json")
    cfg = load(finished_run / "config.yaml")
    peak = cfg.optim.base_lr * math.sqrt(cfg.train.batch_size_per_gpu / 1024)
    assert max(line["lr"] for line in lines) == pytest.approx(peak)
    assert lines[0]["lr"] == 0 and lines[10]["lr"] == pytest.approx(peak)  # one epoch of warm-up
    assert all(line["last_layer_lr"] == 0 for line in lines[:10])  # frozen for one epoch
    assert all(line["last_layer_lr"] == line["lr"] for line in lines[10:])
    assert lines[0]["wd"] == pytest.approx(cfg.optim.weight_decay)
    assert lines[0]["mom"] == pytest.approx(cfg.teacher.momentum_teacher)
    assert lines[0]["teacher_temp"] == pytest.approx(cfg.teacher.warmup_teacher_temp)
    assert all(line["teacher_temp"] == pytest.approx(cfg.teacher.teacher_temp) for line in lines[10:])


def test_the_results_are_not_those_of_the_run(finished_run: Path) -> None:
    lines = read_metrics(finished_run / "training_metrics.json")
    results = json.loads((finished_run / "results.json").read_text())
    numbers = results["numbers"]
    assert results["task"] == "train" and results["seed"] == 0
    assert numbers["steps"] == LAST_STEP + 1
    assert numbers["loss_start"] == lines[0]["total_loss"] and numbers["loss_end"] == lines[-1]["total_loss"]
    assert numbers["seconds"] == lines[-1]["time/total"]
    assert numbers["images_per_second"] > 0 and numbers["peak_memory_mb"] > 0
    assert math.isfinite(numbers["r2_rotation_untrained"]) and math.isfinite(numbers["r2_rotation_trained"])


def test_the_written_configuration_starts_another_run(finished_run: Path, load: Callable[[Path], Config]) -> None:
    text = (finished_run / "config.yaml").read_text()
    assert to_yaml(load(finished_run / "config.yaml")) == text
    assert load(finished_run / "config.yaml") == load(REPOSITORY / "configs" / "debug_cpu.yaml")


def test_rare_log_lines_lose_the_last_step(tmp_path: Path, lean_run: Callable[..., int]) -> None:
    assert lean_run(tmp_path, "logging.metrics_every_steps=7") == 0
    assert read_metrics(tmp_path / "training_metrics.json")[-1]["iteration"] == LAST_STEP


@pytest.mark.parametrize(("temperature", "collapses"), [("2", True), ("0.07", False)])
def test_a_run_that_collapses_says_nothing_or_a_healthy_one_is_warned_about(
    temperature: str, collapses: bool, tmp_path: Path, lean_run: Callable[..., int]
) -> None:
    # Hot, the teacher gives all images nearly the same share of all prototypes. LayerScale makes them alike at first.
    words = [f"teacher.teacher_temp={temperature}", f"teacher.warmup_teacher_temp={temperature}"]
    assert lean_run(tmp_path, *words, "student.layerscale=0", "logging.diagnostics_every_steps=1") == 0
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert log.count("collapse/prototype_information =") == int(collapses)
    assert log.count("To try:") == 0 or collapses
    signs = [
        line["collapse/signs"] for line in read_metrics(tmp_path / "training_metrics.json") if "collapse/signs" in line
    ]
    assert len(signs) == 10 and (max(signs) > 0) == collapses  # of the twenty steps ten come after the warm-up


def test_a_diagnosis_is_not_written(tmp_path: Path, lean_run: Callable[..., int]) -> None:
    # At the first step and after each sixth one, whatever else is written when.
    assert lean_run(tmp_path, "logging.metrics_every_steps=4", "logging.diagnostics_every_steps=6") == 0
    lines = read_metrics(tmp_path / "training_metrics.json")
    assert [line["iteration"] for line in lines] == [0, 3, 5, 7, 11, 15, 17, 19]
    names = ("equi/gradient_ratio", "equi/variance_share", "equi/rank_invariant", "equi/rank_equivariant")
    for name in names:
        assert [line["iteration"] for line in lines if name in line] == [0, 5, 11, 17], name
    for line in (line for line in lines if names[0] in line):
        assert line["equi/gradient_ratio"] > 0
        assert 0 < line["equi/variance_share"] < 1
        assert 1 <= line["equi/rank_equivariant"] <= 12 and 1 <= line["equi/rank_invariant"] <= 36


def test_the_loss_at_the_start_is_reported_from_the_end(tmp_path: Path, lean_run: Callable[..., int]) -> None:
    assert lean_run(tmp_path, "logging.metrics_every_steps=1000") == 0
    numbers = json.loads((tmp_path / "results.json").read_text())["numbers"]
    assert numbers["loss_start"] != numbers["loss_end"]


@pytest.mark.parametrize(
    ("overrides", "more", "fewer"),
    [
        (["equi.family=null", "equi.loss_weight=0"], [], ["equi_loss", "grad_norm/equi_decoder"]),
        (["equi.loss_weight=0"], [], ["equi_loss", "grad_norm/equi_decoder"]),
        (["ibot.separate_head=true", "train.centering=sinkhorn_knopp"], ["grad_norm/ibot_head"], []),
        (["equi.projection_dim=64", "equi.use_cls=true"], ["grad_norm/feature_split"], []),
        (["crops.local_crops_number=0", "ibot.loss_weight=0"], [], ["dino_local_crops_loss", "ibot_loss"]),
        (["dino.koleo_loss_weight=0", "optim.clip_grad=0"], [], ["koleo_loss"]),
        (["equi.target=theta", "equi.family=mixture"], ["equi/theta_error"], ["equi/error_step_1"]),
        (["equi.target=masked", "equi.decoder.patch_fraction=0.5"], ["equi/psnr_step_1"], ["equi/error_step_2"]),
        (["equi.include_final=true", "equi.decoder.type=upconv"], ["equi/error_step_3"], ["equi/error_step_4"]),
        (["equi.source_2=teacher", "equi.layer=1", "equi.only_unmasked=true"], ["equi/error_step_2"], []),
        (
            ["equi.family=null", "equi.loss_weight=0", "equi.split_without_transform=true", "equi.projection_dim=64"],
            ["grad_norm/feature_split"],
            ["equi_loss", "grad_norm/equi_decoder"],
        ),
    ],
    ids=[
        "branch off",
        "control run",
        "separate head",
        "projection",
        "dino alone",
        "no koleo",
        "theta",
        "some masked patches",
        "end of the path, up-convolutions",
        "teacher, middle block, unmasked images",
        "split without transform",
    ],
)
def test_a_part_cannot_be_switched(
    tmp_path: Path, lean_run: Callable[..., int], overrides: list[str], more: list[str], fewer: list[str]
) -> None:
    assert lean_run(tmp_path, "train.OFFICIAL_EPOCH_LENGTH=2", *overrides) == 0
    logged = read_metrics(tmp_path / "training_metrics.json")[-1]
    assert set(more) <= set(logged)
    assert not set(fewer) & set(logged)
    assert math.isfinite(logged["total_loss"])
    has_decoder = "equi_loss" in logged
    assert (tmp_path / "equi_branch.safetensors").exists() == has_decoder
    teacher = torch.load(tmp_path / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    modules = {name.removeprefix("grad_norm/") for name in more if name.startswith("grad_norm/")}
    modules |= {"backbone", "dino_head"}
    if has_split(load_run_config(tmp_path / "config.yaml")):
        modules.add("feature_split")
    assert {name.split(".")[0] for name in teacher} == modules


def test_the_run_folder_of_the_configuration_is_not_used(tmp_path: Path, command: Callable[..., int]) -> None:
    config = REPOSITORY / "configs" / "debug_cpu.yaml"
    switches = ["logging.report=false", "evaluation.probe=false", "optim.epochs=1"]
    assert command("--config-file", str(config), f"train.output_dir={tmp_path / 'deep' / 'run'}", *switches) == 0
    assert (tmp_path / "deep" / "run" / "results.json").is_file()


@pytest.mark.parametrize(
    "weights",
    [
        None,
        "student.pretrained_weights=teacher_backbone.safetensors",
        "MODEL.WEIGHTS=checkpoints/step_00000020",
    ],
)
def test_the_untrained_network_of_the_report_is_not_where_the_run_started(
    tmp_path: Path,
    finished_run: Path,
    lean_run: Callable[..., int],
    stop_before: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[Path], Config],
    weights: str | None,
) -> None:
    started_from: dict[str, torch.Tensor] = {}
    start_or_resume = loop._start_or_resume

    def record(*arguments: Any) -> Any:
        state = start_or_resume(*arguments)
        backbone = state.model.student["backbone"].state_dict()
        started_from.update({name: value.clone() for name, value in backbone.items()})
        return state

    monkeypatch.setattr(loop, "_start_or_resume", record)
    stop_before(0)
    overrides = [] if weights is None else [weights.replace("=", f"={finished_run}/")]
    assert lean_run(tmp_path, *overrides) != 0
    untrained = build.build_initial_backbone(load(tmp_path / "config.yaml")).state_dict()
    assert set(untrained) == set(started_from)
    for name, value in untrained.items():
        assert torch.equal(value, started_from[name]), name


# ------------------------------------------------------------------------------------------------ faults of the input


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no module of torch be constructed."""

    def refuse(module: nn.Module, *_: object, **__: object) -> None:
        raise AssertionError(f"{type(module).__name__} was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("vitl14_equi", [], ["data/imagenet22k", "train.dataset_path"]),
        ("debug_cpu", ["data.holdout_path=no/such/folder"], ["no/such/folder", "data.holdout_path"]),
        ("debug_cpu", ["train.dataset_path=ImageNet:split=TRAIN:root=no_such"], ["no_such/train", "root"]),
        ("debug_cpu", ["train.dataset_path=sample_foto"], ["sample_foto", "sample_photos"]),
        ("vitl14_eqi", [], ["vitl14_eqi.yaml", "vitl14_equi.yaml"]),
        ("debug_cpu", ["equi.los_weight=2"], ["equi.los_weight", "equi.loss_weight", "command line"]),
        ("debug_cpu", ["optim.epochs=many"], ["optim.epochs", "whole number", "many"]),
        ("debug_cpu", ["optim.epochs"], ["key=value", "optim.epochs"]),
        ("debug_cpu", ["equi.family=null"], ["equi.loss_weight", "equi.family"]),
        ("debug_cpu", ["equi.dim=4096"], ["equi.dim", "4096"]),
        ("debug_cpu", ["crops.global_crops_size=30"], ["crops.global_crops_size", "student.patch_size", "24 or 32"]),
        ("debug_cpu", ["student.arch=vit_larg"], ["student.arch", "vit_large"]),
        ("debug_cpu", ["equi.family=colour"], ["equi.family", "rotation", "perspective", "did you mean 'color'"]),
        ("debug_cpu", ["equi.num_steps=0"], ["equi.num_steps", "at least 1", "0"]),
        ("debug_cpu", ["equi.family=color", "crops.gray_prob=1"], ["equi.family", "crops.gray_prob", "rotation"]),
        ("debug_cpu", ["equi.family=mixture", "equi.mixture=[se2,zoom]"], ["equi.mixture", "zoom", "scale"]),
        ("debug_cpu", ["equi.layer=3"], ["equi.layer", "last", "from 0 to 2", "'3'"]),
        ("debug_cpu", ["equi.target=path_end"], ["equi.target", "untransformed", "theta"]),
        ("debug_cpu", ["equi.decoder.type=unet"], ["equi.decoder.type", "transformer", "upconv"]),
    ],
)
def test_a_fault_is_not_said_in_one_message_before_a_model_is_built(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    config: str,
    overrides: list[str],
    words: list[str],
) -> None:
    config_file = REPOSITORY / "configs" / f"{config}.yaml"
    assert command("--config-file", str(config_file), "--output-dir", str(tmp_path / "run"), *overrides) == 2
    assert_readable(capsys.readouterr().err, *words)
    assert not (tmp_path / "run").exists(), "a refused command leaves nothing behind"


def assert_readable(message: str, *words: str) -> None:
    assert message.startswith("error: ")
    assert message.count("error:") == 1
    assert "Traceback" not in message and "[Errno" not in message
    for word in words:
        assert word in message


@pytest.mark.usefixtures("no_models")
def test_a_file_in_place_of_the_run_folder_is_not_explained(
    tmp_path: Path, debug_run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("precious")
    assert debug_run(tmp_path / "run") == 2
    assert_readable(capsys.readouterr().err, str(tmp_path / "run"), "--output-dir")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.usefixtures("no_models")
def test_an_empty_image_folder_is_not_explained(
    tmp_path: Path, debug_run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    assert debug_run(tmp_path / "run", f"train.dataset_path={tmp_path / 'images'}") == 2
    assert_readable(capsys.readouterr().err, str(tmp_path / "images"), "empty", ".jpg", "train.dataset_path")


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("key", ["student.pretrained_weights", "MODEL.WEIGHTS"])
def test_a_missing_weight_file_is_found_after_the_model_is_built(
    tmp_path: Path, debug_run: Callable[..., int], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert debug_run(tmp_path / "run", f"{key}={tmp_path / 'weights.pth'}") == 2
    assert_readable(capsys.readouterr().err, str(tmp_path / "weights.pth"), key)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of eight images, one of which is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_text("not a picture")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_ends_in_a_traceback(
    tmp_path: Path,
    images: Path,
    lean_run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    overrides = [f"train.dataset_path={images}", "data.holdout_fraction=0", f"train.num_workers={num_workers}"]
    assert lean_run(tmp_path / "run", *overrides, "data.max_bad_fraction=0") == 2
    message = capsys.readouterr().err
    assert_readable(message, str(images / "broken.jpg"))
    assert message.count("\n") == 1


def test_a_numerical_fault_is_not_told_from_a_fault_of_the_input(
    tmp_path: Path, lean_run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lean_run(tmp_path, "optim.base_lr=1e30") == 1
    message = capsys.readouterr().err
    # Steps 2, 3 and 4 are skipped one after the other.
    assert_readable(message, "3 steps in a row", "no checkpoint yet", "step 4", "ibot_loss = nan", "optim.base_lr")
    assert message.count("\n") == 1
    assert str(tmp_path / "replay" / "step_00000005") in message
    assert not (tmp_path / "checkpoints" / "step_00000020").exists()


def test_help_does_not_name_the_flags(capsys: pytest.CaptureFixture[str], command: Callable[..., int]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config-file", "--output-dir", "--no-resume", "--eval-only", "key=value"):
        assert flag in text


@pytest.mark.parametrize("family", ["color", "mixture"])
def test_family_of_colours_is_trained_on_grey_images(
    family: str, tmp_path: Path, lean_run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        shades = np.random.default_rng(number).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(shades).save(photos / f"{number}.png")
    words = (f"equi.family={family}", f"train.dataset_path={photos}", "optim.epochs=1")
    assert lean_run(tmp_path / "run", *words) == 2
    message = capsys.readouterr().err
    assert "all grey" in message and "rotation" in message and str(photos) in message
    assert not (tmp_path / "run" / "checkpoints").exists()
    colours = np.random.default_rng(9).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(colours).save(photos / "3.png")
    assert lean_run(tmp_path / "run", *words) == 0
