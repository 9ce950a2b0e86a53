"""`eval/segmentation/run.py` as a user types it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.summary import headline_numbers

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "segmentation" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu", "--set")
RECIPE = ("resize=24", "crop=24", "stride=16", "steps=30", "warmup_steps=1", "batch_size=4", "lr=0.03")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pairs in which bright is one class and dark the other."""
    root = tmp_path_factory.mktemp("segmentation")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    (root / "classes.txt").write_text("dark\nbright\n")
    for number in range(10):
        bright = rng.integers(0, 2, (3, 4)).repeat(8, axis=0).repeat(8, axis=1)  # [24, 32]
        Image.fromarray(np.stack([bright * 200 + 20] * 3, axis=-1).astype(np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(bright.astype(np.uint8)).save(root / f"annotations/{number}.png")
    return root


def test_head_learns_nothing_or_the_files_are_not_written(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    words = (*TINY, *RECIPE, "head=multiscale", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    (numbers,) = document["numbers"].values()
    assert document["task"] == "segmentation" and document["settings"]["framework"] == "torch"
    assert set(numbers["iou"]) == {"dark", "bright"} and numbers["num_images"] == 2
    assert numbers["miou"] > 1.2 * numbers["majority_baseline"]["miou"]
    assert headline_numbers(document) == {"mIoU": numbers["miou"]}
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 400
    first = (tmp_path / "results.json").read_text()
    assert script.main([*words]) == 0  # from the last checkpoint
    assert json.loads((tmp_path / "results.json").read_text())["numbers"] == json.loads(first)["numbers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--data", "FOLDER", "--layout", "ade20k"), "ADE20K must lie as"),
        (("--data", "FOLDER", "--layout", "camvid", "--num-classes", "3"), "the classes of camvid are fixed"),
        (("--data", "FOLDER", "--set", "heads=linear"), "did you mean head?"),
    ],
)
def test_wrong_input_gives_a_traceback(
    script: ModuleType,
    folder: Path,
    tmp_path: Path,
    assert_refused: Callable[..., None],
    words: tuple[str, ...],
    message: str,
) -> None:
    given = [word.replace("FOLDER", str(folder)) for word in words]
    assert_refused(script, ["--weights", "random:vit_test_tiny/8", *given, "--output", str(tmp_path / "out")], message)


def test_missing_packages_give_a_traceback(
    script: ModuleType,
    folder: Path,
    tmp_path: Path,
    assert_refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    monkeypatch.delitem(sys.modules, "eval.segmentation.mmseg_run", raising=False)  # where mmsegmentation is installed
    monkeypatch.delattr("eval.segmentation.mmseg_run", raising=False)
    words = ("--framework", "mmseg", *TINY, *RECIPE, "--data", str(folder), "--output", str(tmp_path / "out"))
    assert_refused(script, words, "pip install -r eval/segmentation/requirements.txt, or take --framework torch")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_gives_a_traceback_or_no_name(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for number in range(8):
        (copy / "images" / f"{number}.png").write_bytes(b"no image")
    words = (*TINY, *RECIPE, "--data", str(copy), "--output", str(tmp_path / "out"), "--num-workers", workers)
    before = multiprocessing.active_children()
    assert script.main([*words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read the image ") and error.count("\n") == 1
    assert multiprocessing.active_children() == before  # this process would wait for them at its end


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_config_beside_the_script_is_refused(script: ModuleType, path: Path) -> None:
    text = path.read_text()
    framework = script.MMSEG if "--framework mmseg" in text else script.TORCH
    read_settings(script.TASKS[framework].settings, path, []).check()
    assert text.startswith("# Purpose   ")
