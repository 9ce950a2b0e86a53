"""`eval/classification/run.py` as a user types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "classification" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--size", "32", "--epochs", "4", "--draws", "2", "--k", "1", "5")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return train/ and val/ of two classes: dark and bright noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for label, low in (("bright", 140), ("dark", 0)):
            place = root / part / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 100, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def test_a_task_has_no_number(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert script.main([*TINY, "--data", str(folder), *places]) == 0
    document = results(tmp_path / "out")
    assert document["task"] == "classification"
    (numbers,) = document["numbers"].values()
    assert set(numbers) == {"knn", "linear", "log_regression", "few_shot", "retrieval"}
    assert set(numbers["knn"]["top1"]) == {"1", "5"}
    assert set(numbers["linear"]["classifiers"]) == {"1 block", "1 block, patch mean"}  # the network has three
    assert set(numbers["few_shot"]) == {"1", "2", "4", "8"}  # 12 images a class
    assert numbers["few_shot"]["8"]["class_mean"]["mean"] > 0.9  # dark and bright
    assert numbers["log_regression"]["top1"] > 0.9
    assert 0.5 < numbers["retrieval"]["map"] <= 1
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("k-NN", "linear", "retrieval", "few-shot"))


def test_pixels_whose_tokens_have_two_widths_are_not_classified(
    tmp_path: Path, script: ModuleType, folder: Path
) -> None:
    places = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    words = ("--weights", "pixels", "--size", "32", "--epochs", "4", "--tasks", "linear", "knn")
    assert script.main([*words, "--data", str(folder), *places]) == 0
    assert results(tmp_path / "out")["numbers"]["pixels"]["linear"]["best"]["top1"] > 0.9  # dark and bright


def test_second_run_reads_the_images_again_or_gives_other_digits(
    tmp_path: Path, script: ModuleType, folder: Path
) -> None:
    found = []
    for number in range(2):
        places = ("--output", str(tmp_path / str(number)), "--cache", str(tmp_path / "cache"))
        assert script.main([*TINY, "--data", str(folder), *places]) == 0
        found.append(results(tmp_path / str(number))["numbers"])
    assert found[0] == found[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and validation images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data FOLDER with train/ and val/"),
        (("--data", "nowhere"), "expected nowhere/train and nowhere/val"),
        (("--train", "a"), "alone, or both --train and --val"),
        (("--data", "FOLDER", "--size", "33"), "multiple of its patch size 8, got 33"),
        (("--train", "FOLDER/train", "--val", "FOLDER/val/dark"), "have no classes"),
    ],
)
def test_wrong_input_gives_a_traceback(
    script: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    words = [word.replace("FOLDER", str(folder)) for word in arguments]
    places = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert script.main([*TINY, *words, *places]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_reassessed_labels_are_not_what_is_scored(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = tmp_path / "val"  # flat, as ImageNet's archive is
    val.mkdir()
    for number, name in enumerate(("bright/0", "dark/0", "dark/1", "bright/1"), start=1):
        shutil.copy(folder / "val" / f"{name}.png", val / f"ILSVRC2012_val_{number:08d}.png")
    labels = tmp_path / "real.json"
    places = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--real-labels", str(labels))
    words = (
        "--weights",
        "pixels",
        "--size",
        "32",
        "--k",
        "1",
        "--epochs",
        "4",
        "--train",
        str(folder / "train"),
        "--val",
        str(val),
    )
    for entries, expected in (([[0], [1], [], [0, 1]], 1.0), ([[1], [0], [1], [0, 1]], 0.5)):
        labels.write_text(json.dumps(entries))
        assert script.main([*words, *places]) == 0
        (numbers,) = results(tmp_path / "out")["numbers"].values()
        assert set(numbers) == {"knn", "linear", "log_regression"}
        assert numbers["knn"]["top1"]["1"] == numbers["log_regression"]["top1"] == expected  # dark and bright
    assert script.main([*words, *places, "--tasks", "knn", "retrieval"]) != 0
    assert "leave retrieval out of --tasks" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def finetune_script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT.with_name("finetune.py"))


def test_fine_tuned_classifier_is_not_written(tmp_path: Path, finetune_script: ModuleType, folder: Path) -> None:
    words = ("--weights", "random:vit_test_tiny/8", "--size", "32", "--epochs", "2", "--data", str(folder))
    recipe = ("--set", "batch_size=8", "lr=0.01", "rand_augment=3")
    assert finetune_script.main([*words, *recipe, "--output", str(tmp_path)]) == 0
    document = results(tmp_path)
    assert document["task"] == "finetune"
    assert document["settings"]["recipe"]["rand_augment"] == 3
    (numbers,) = document["numbers"].values()
    assert len(numbers["top1_by_epoch"]) == 2 and numbers["top1"] == numbers["top1_by_epoch"][-1]
    saved = torch.load(tmp_path / "classifier.pth", weights_only=True)
    assert saved["classes"] == ["bright", "dark"] and saved["model"]["head.weight"].shape == (2, 48)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "speed=3"), "a name of epochs, warmup_epochs"),
        (("--set", "lr=fast"), "--set lr takes a number, got 'fast'"),
        (("--train", "a"), "alone, or both --train and --val"),
    ],
)
def test_wrong_recipe_gives_a_traceback(
    finetune_script: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    base = ("--weights", "random:vit_test_tiny/8", "--size", "32", "--data", str(folder))
    assert finetune_script.main([*base, *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
