"""`eval/depth/run.py` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.summary import headline_numbers

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "depth" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu", "--set")
RECIPE = ("height=24", "width=32", "bins=16", "steps=6", "warmup_steps=1", "batch_size=4", "lr=0.03", "save_every=2")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(make_pairs: Callable[[str, Callable[[Any], Any]], Path]) -> Path:
    """Return pairs in which bright means far."""
    return make_pairs("depth", lambda bright: (bright * 3000 + 1000).astype(np.uint16))


def test_head_learns_nothing_or_the_files_are_not_written(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*TINY, *RECIPE, "steps=40", "--max-depth", "5", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    (numbers,) = document["numbers"].values()
    assert document["task"] == "depth" and document["settings"]["recipe"]["steps"] == 40
    assert numbers["num_images"] == 2 and document["settings"]["num_train_images"] == 8
    assert numbers["rmse"] < 0.8 * numbers["mean_depth_baseline"]["rmse"]
    assert numbers["train_loss"]["loss"][-1] < numbers["train_loss"]["loss"][0]
    assert headline_numbers(document)["depth RMSE, m"] == numbers["rmse"]
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 400
    assert "mean training depth" in capsys.readouterr().out


def test_stopped_run_ends_with_other_numbers(
    script: ModuleType, folder: Path, assert_resumes: Callable[..., None]
) -> None:
    words = (*TINY, *RECIPE, "head=dpt", "dpt_channels=8", "finetune=true", "--data", str(folder))
    assert_resumes(script, script.DepthModel, words, stop_at=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--layout", "nyu"), "NYUv2 must lie as"),
        (("--set", "heads=dpt"), "did you mean head?"),
        (("--set", "head=mlp"), "expected head to be one of linear, linear4, dpt"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--weights", "runs/nowhere"), "there is no file 'runs/nowhere'"),
    ],
)
def test_wrong_input_gives_a_traceback(
    assert_task_refused: Callable[..., None], words: tuple[str, ...], message: str
) -> None:
    assert_task_refused(["--weights", "random:vit_test_tiny/8", *words], message)


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_config_beside_the_script_is_refused(script: ModuleType, path: Path) -> None:
    read_settings(script.DepthSettings, path, []).check()
    assert path.read_text().startswith("# Purpose   ")
