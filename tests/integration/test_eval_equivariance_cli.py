"""The equivariance harness as a user runs it: a file in a clean clone, from any folder."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2_equi.models.registry import build_backbone

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "equivariance" / "run.py"
QUICK = ("--draws", "2", "--epochs", "1", "--hidden", "8", "--k", "1", "--device", "cpu")
TINY = ("--weights", "random:vit_test_tiny/8", "--size", "16")


def write_images(folder: Path, count: int, *, first: int = 0, grey: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(first)
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., :1].repeat(3, axis=2) if grey else pixels).save(folder / f"{first + index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/ and val/, of two classes each."""
    root = tmp_path_factory.mktemp("images")
    for number, (split, label) in enumerate((s, c) for s in ("train", "val") for c in ("cat", "dog")):
        write_images(root / split / label, 6 if split == "train" else 3, first=100 * number)
    return root


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Return the script as a module: one interpreter for most tests. Its path guard acts on a copy of the path."""
    before = sys.path
    sys.path = list(before)
    spec = importlib.util.spec_from_file_location("eval_equivariance_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path = before


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def test_the_file_runs_from_another_folder_without_installation(
    tmp_path: Path, images: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = (*TINY, "--data", str(images), "--families", "rotation", "--seeds", "0", "1", *QUICK)
    process = start_python(str(SCRIPT), *arguments, cwd=tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    document = results(tmp_path / "equivariance")
    numbers = document["numbers"]["random:vit_test_tiny/8"]
    assert document["task"] == "equivariance"
    assert set(numbers["families"]) == {"rotation"}
    rotation = numbers["families"]["rotation"]
    assert set(rotation["r2"]) == {"cls", "patch_mean", "both"}
    assert rotation["r2"]["both"]["num_train_pairs"] == 24
    assert len(rotation["r2"]["both"]["pooled"]["values"]) == 2
    assert list(rotation["r2_by_pairs"]) == ["6", "12", "18", "24"]
    assert 0 <= numbers["knn"]["both"]["1"] <= 1
    assert (tmp_path / "equivariance" / "equivariance.png").read_bytes().startswith(b"\x89PNG")
    assert "R2 of the parameters" in output and "rotation" in output and "k-NN accuracy" in output


def test_a_run_is_not_compared_with_its_own_start(
    tmp_path: Path, images: Path, script: ModuleType, lean_run: Any
) -> None:
    run = tmp_path / "my_run"
    assert (
        lean_run(run, "equi.projection_dim=40", "equi.dim=16", "equi.fill=zeros", "train.OFFICIAL_EPOCH_LENGTH=1") == 0
    )
    before = (run / "results.json").read_bytes()
    arguments = ["--weights", str(run), "random", "--data", str(images), "--families", "se2", "--seeds", "0", *QUICK]
    assert script.main(arguments) == 0
    document = results(run / "eval" / "equivariance")
    assert set(document["numbers"]) == {"my_run", "my_run before training"}
    family = document["numbers"]["my_run"]["families"]["se2"]
    assert set(family["r2"]) == {"cls", "patch_mean", "both", "invariant", "equivariant"}
    assert set(family["r2"]["both"]["per_output"]) == {"rotation_deg", "translation_x_px", "translation_y_px"}
    assert document["settings"]["models"]["my_run"]["ranges"]["fill"] == "zeros"
    assert document["settings"]["models"]["my_run"]["size"] == 32
    assert document["config_sha256"] is not None
    assert (run / "results.json").read_bytes() == before  # those of the training


def test_curve_over_the_pairs_is_measured_where_it_is_asked_for(
    tmp_path: Path, images: Path, script: ModuleType
) -> None:
    counts = {}
    for shares in ([], ["0.5"]):
        output = tmp_path / str(len(shares))
        words = ["--data", str(images), "--families", "rotation", "--seeds", "0", *QUICK, "--output", str(output)]
        assert script.main([*TINY, *words, "--fractions", *shares]) == 0
        (numbers,) = results(output)["numbers"].values()
        counts[len(shares)] = list(numbers["families"]["rotation"]["r2_by_pairs"])
    assert counts == {0: ["24"], 1: ["12", "24"]}


def test_a_folder_is_not_split_into_halves(tmp_path: Path, script: ModuleType) -> None:
    folder = write_images(tmp_path / "photos", 12)
    seen = []
    for seed in ("0", "0", "1"):
        args = script.parse_arguments([*TINY, "--data", str(folder), "--split-seed", seed])
        train, test = (sorted(part.name(i) for i in range(len(part))) for part in script.choose_data(args))
        assert len(train) == len(test) == 6
        assert not set(train) & set(test)
        seen.append(train)
    assert seen[0] == seen[1] != seen[2]


def test_without_data_the_built_in_photographs_are_not_used(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--train-images", "6", "--test-images", "3", "--seeds", "0", "--features", "cls", *QUICK]
    assert script.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    families = results(tmp_path / "out")["numbers"]["random:vit_test_tiny/8"]["families"]
    assert set(families) == {"rotation", "translation", "se2", "blur"}
    assert "the images are grey: color is left out" in capsys.readouterr().out


def test_a_bare_weight_file_is_not_measured(tmp_path: Path, images: Path, script: ModuleType) -> None:
    torch.manual_seed(0)
    save_file(build_backbone("vit_test_tiny", img_size=16, patch_size=8).state_dict(), tmp_path / "w.safetensors")
    arguments = ["--weights", str(tmp_path / "w.safetensors"), "--train", str(images / "train"), "--test"]
    arguments += [str(images / "val"), "--families", "mixture", "--features", "both", "--fill", "zeros", "--seeds", "3"]
    assert script.main([*arguments, *QUICK, "--output", str(tmp_path / "deep" / "out")]) == 0
    document = results(tmp_path / "deep" / "out")
    assert document["seed"] == 3
    assert document["settings"]["models"]["w.safetensors"]["ranges"]["fill"] == "zeros"
    assert document["settings"]["models"]["w.safetensors"]["size"] == 16


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (("--weights", "no_such_file.pth"), "no_such_file.pth"),
        (("--weights", "random"), "name a run too"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--train", "sample_photos"), "both --train and --test"),
        (("--data", "sample_photos"), "split=VAL"),
        (("--size", "20"), "multiple of its patch size 8, got 20; try 16 or 24"),
        (("--features", "invariant"), "no features 'invariant'"),
        (("--draws", "0"), "one draw"),
    ],
)
def test_a_fault_of_the_input_is_not_said_plainly_or_leaves_files(
    tmp_path: Path,
    images: Path,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    faulty: tuple[str, ...],
    message: str,
) -> None:
    output = tmp_path / "out"
    data = () if "--data" in faulty else ("--data", str(images))
    assert script.main([*TINY, *data, *QUICK, "--output", str(output), *faulty]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not output.exists()


def test_colour_is_sought_in_grey_images(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "grey", 6, grey=True)
    assert script.main([*TINY, "--data", str(folder), "--families", "color", *QUICK]) == 2
    assert "the images are grey and show no color; choose among rotation" in capsys.readouterr().err


def test_a_folder_without_test_images_is_split_anyway(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "data" / "train", 4)
    assert script.main([*TINY, "--data", str(tmp_path / "data"), *QUICK]) == 2
    assert "has train/ but none of val, validation, test" in capsys.readouterr().err
