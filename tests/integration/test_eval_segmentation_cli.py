"""`eval/segmentation/run.py` as a user types it."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dinov2_equi.evaluation.dense.settings import read_settings

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "segmentation" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu", "--set")
RECIPE = ("resize=24", "crop=24", "stride=16", "steps=30", "warmup_steps=1", "batch_size=4", "lr=0.03")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(labelled_pairs: Path) -> Path:
    return labelled_pairs


def test_head_learns_nothing_or_the_files_are_not_written(learn_segmentation: Callable[..., dict[str, Any]]) -> None:
    assert learn_segmentation([*TINY, *RECIPE])["settings"]["framework"] == "torch"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--layout", "ade20k"), "ADE20K must lie as"),
        (("--layout", "camvid", "--num-classes", "3"), "the classes of camvid are fixed"),
        (("--set", "heads=linear"), "did you mean head?"),
    ],
)
def test_wrong_input_gives_a_traceback(
    assert_task_refused: Callable[..., None], words: tuple[str, ...], message: str
) -> None:
    assert_task_refused(["--weights", "random:vit_test_tiny/8", *words], message)


def test_missing_packages_give_a_traceback(
    assert_task_refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    monkeypatch.delitem(sys.modules, "eval.segmentation.mmseg_run", raising=False)  # where mmsegmentation is installed
    monkeypatch.delattr("eval.segmentation.mmseg_run", raising=False)
    message = "pip install -r eval/segmentation/requirements.txt, or take --framework torch"
    assert_task_refused(["--framework", "mmseg", *TINY, *RECIPE], message)


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
