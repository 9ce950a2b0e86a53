"""The k-NN harness as a user runs it: a file in a clean clone, from any folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.models.registry import build_backbone

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "classification" / "knn.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three classes that differ in colour; the validation set lacks the first one."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, classes, count in (("train", (0, 1, 2), 4), ("val", (1, 2), 2)):
        for label in classes:
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (24, 36, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def knn() -> Iterator[ModuleType]:
    """Return the script as a module: one interpreter for most tests. Its path guard acts on a copy of the path."""
    before = sys.path
    sys.path = list(before)
    spec = importlib.util.spec_from_file_location("eval_classification_knn", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path = before


def arguments(images: Path, *more: str) -> list[str]:
    data = ["--train", str(images / "train"), "--val", str(images / "val"), "--size", "32", "--k", "1", "5", "500"]
    return [*data, "--device", "cpu", *more]


def test_the_file_runs_from_another_folder_without_installation(tmp_path: Path, images: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments(images, "--weights", "pixels")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "knn.json").read_text())
    # Colour separates the classes, so only labels that do not belong together could cost a point.
    assert results["numbers"]["top1"] == {"1": 1.0, "5": 1.0}
    assert results["task"] == "knn" and results["settings"]["size"] == 32
    assert "100.0 %" in done.stdout and "left out" in done.stdout and "500" in done.stdout


def test_a_run_folder_is_scored_with_its_own_settings(
    tmp_path: Path, images: Path, knn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights = build_backbone("vit_test_tiny", img_size=16, patch_size=8).state_dict()
    save_file(weights, tmp_path / "teacher_backbone.safetensors")
    (tmp_path / "config.yaml").write_text(
        "student: {arch: vit_test_tiny, interpolate_offset: 0.0, interpolate_antialias: true}\n"
        "data: {mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}\n"
    )
    used: list[EvalModel] = []

    def record(model: EvalModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        used.append(model)
        return features(model, *args, **kwargs)

    features = EvalModel.features
    monkeypatch.setattr(EvalModel, "features", record)
    assert knn.main(arguments(images, "--run", str(tmp_path), "--output", str(tmp_path / "deep" / "r.json"))) == 0
    model = used[0]
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (model.backbone.interpolate_offset, model.backbone.interpolate_antialias) == (0.0, True)
    assert 0 <= json.loads((tmp_path / "deep" / "r.json").read_text())["numbers"]["top1"]["5"] <= 1


def test_random_weights_are_scored(tmp_path: Path, images: Path, knn: ModuleType) -> None:
    model = ("--weights", "random", "--arch", "vit_test_tiny", "--patch-size", "8")
    assert knn.main(arguments(images, *model, "--output", str(tmp_path / "r.json"))) == 0
    assert set(json.loads((tmp_path / "r.json").read_text())["numbers"]["top1"]) == {"1", "5"}


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (("--weights", "no_such_file.pth"), "no_such_file.pth"),
        (("--weights", "random", "--arch", "vit_smal"), "vit_small"),
        (("--weights", "pixels", "--train", "no_such_folder"), "no_such_folder"),
        (("--weights", "pixels", "--k", "700"), "smaller --k"),
        (("--weights", "random", "--arch", "vit_test_tiny", "--patch-size", "7"), "patch size 7"),
        (("--run", "no_such_run"), "no_such_run is no run"),
        (("--weights", "pixels", "--arch", "vit_small"), "--arch is for --weights random"),
        (("--weights", "pixels", "--device", "cuda:64"), "device cuda:64: PyTorch sees"),
        (("--weights", "pixels", "--device", "gpu"), "a device is cpu, cuda, cuda:1, ...; got 'gpu'"),
    ],
)
def test_a_fault_of_the_input_is_said_plainly_and_leaves_no_file(
    tmp_path: Path,
    images: Path,
    knn: ModuleType,
    capsys: pytest.CaptureFixture[str],
    faulty: tuple[str, ...],
    message: str,
) -> None:
    assert knn.main(arguments(images, *faulty, "--output", str(tmp_path / "r.json"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "r.json").exists()
