"""The harnesses of dense tasks on several processes: the same numbers as one, files of the first process alone."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from dinov2_equi.fsdp.checkpoint import CheckpointStore, sha256_of_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu")
LOOP = ("steps=6", "warmup_steps=1", "batch_size=4", "lr=0.01", "save_every=4")
RECIPES = {
    "depth": (
        "height=24",
        "width=32",
        "bins=16",
        "bins_weight=0.1",
        "head=dpt",
        "dpt_channels=8",
        "finetune=true",
        *LOOP,
    ),
    "segmentation": ("resize=24", "crop=24", "stride=16", "head=multiscale", *LOOP),
}
"""The frozen backbone for the head with a batch norm: before one some gradients of a backbone are rounding, which AdamW
makes as large as the others."""

Script = Callable[[str], ModuleType]
OnRanks = Callable[[int, Callable[[], int]], list[int]]

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> Script:
    return lambda task: load_script(REPOSITORY / "eval" / task / "run.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_uneven_pairs: Callable[[Path, int], Path]) -> Path:
    """Return images with depth maps and class maps, of which some pixels are unknown."""
    return write_uneven_pairs(tmp_path_factory.mktemp("dense"), 11)


def numbers_in(folder: Path) -> dict[str, Any]:
    (numbers,) = json.loads((folder / "results.json").read_text())["numbers"].values()
    return dict(numbers)


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], tolerance)
    else:
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("task", RECIPES)
def test_the_number_of_processes_changes_what_is_measured(
    task: str, script: Script, folder: Path, tmp_path: Path, run_on_ranks: OnRanks
) -> None:
    run = script(task)
    words = [*TINY, "--data", str(folder), "--set", *RECIPES[task], "--output"]
    assert run.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: run.main([*words, str(tmp_path / "two")])) == [0, 0]
    # Sums in another order, carried through six steps; a share of pixels can only move by whole pixels.
    assert_close(numbers_in(tmp_path / "two"), numbers_in(tmp_path / "one"), 1e-4)
    one, two = (CheckpointStore(tmp_path / name / "checkpoints", read_only=True).load() for name in ("one", "two"))
    for name, value in one.tensors["model"].items():
        torch.testing.assert_close(two.tensors["model"][name], value, rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "two" / "results.json").read_text())["settings"]
    assert settings["num_processes"] == 2 and "launcher" not in settings
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_resume_on_another_number_of_processes_ends_elsewhere(
    script: Script, folder: Path, tmp_path: Path, run_on_ranks: OnRanks
) -> None:
    run = script("depth")
    words = [*TINY, "--data", str(folder), "--set", *RECIPES["depth"], "--output"]
    assert run.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: run.main([*words, str(tmp_path / "two")])) == [0, 0]
    (tmp_path / "two" / "checkpoints" / "step_00000006").rename(tmp_path / "later")
    assert run.main([*words, str(tmp_path / "two")]) == 0
    assert_close(numbers_in(tmp_path / "two"), numbers_in(tmp_path / "one"), 1e-4)


def test_a_batch_that_cannot_be_divided_is_made_smaller(
    script: Script, folder: Path, tmp_path: Path, run_on_ranks: OnRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--data", str(folder), "--output", str(tmp_path), "--set", *RECIPES["depth"], "batch_size=3"]
    assert run_on_ranks(2, lambda: script("depth").main(words)) == [2, 2]
    assert "batch_size=3 counts the images of all processes: take a multiple of 2" in capfd.readouterr().err


def test_a_signal_to_one_process_leaves_the_others_waiting_or_loses_the_step(
    script: Script, folder: Path, tmp_path: Path, run_on_ranks: OnRanks
) -> None:
    run = script("depth")
    words = [*TINY, "--data", str(folder), "--set", *RECIPES["depth"], "save_every=100", "--output"]
    losses = run.DepthModel.losses

    def command() -> int:
        calls = 0

        def signalled(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR2)
            return losses(*arguments)

        run.DepthModel.losses = signalled
        return int(run.main([*words, str(tmp_path / "two")]))

    assert run_on_ranks(2, command) == [75, 75]
    assert CheckpointStore(tmp_path / "two" / "checkpoints", read_only=True).latest_step() == 3
    assert run.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: run.main([*words, str(tmp_path / "two")])) == [0, 0]
    assert_close(numbers_in(tmp_path / "two"), numbers_in(tmp_path / "one"), 1e-4)


@pytest.mark.parametrize("detector", ["retinanet", "linear"])
def test_processes_of_a_detector_end_with_different_weights_or_lose_detections(
    detector: str, script: Script, tmp_path: Path, run_on_ranks: OnRanks
) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for number in range(3):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[8:32, 4 + 8 * number : 34 + 8 * number] = 255
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            box = [4 + 8 * number, 8, 30, 24]
            annotations.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": box, "area": 720})
        document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    run = script("detection")
    recipe = (f"detector={detector}", "size=64", "channels=8", "anchor_size=16", "detections=5", "score_threshold=0")
    words = ["--weights", "random:vit_test_tiny/16", "--device", "cpu", "--data", str(tmp_path)]
    words += ["--set", *recipe, "steps=3", "warmup_steps=1", "batch_size=2", "lr=0.001", "curve_every=2"]
    evaluate = run.DetectionTask.evaluate

    def command() -> int:
        def noted(task: object, of: Any, *arguments: object) -> object:
            (tmp_path / f"weights{os.environ['RANK']}").write_text(sha256_of_tensors(of.model.state_dict()))
            return evaluate(task, of, *arguments)

        run.DetectionTask.evaluate = noted
        return int(run.main([*words, "--output", str(tmp_path / "two")]))

    assert run_on_ranks(2, command) == [0, 0]
    numbers = numbers_in(tmp_path / "two")
    assert numbers["curve"]["step"] == [2, 3]
    assert numbers["num_images"] == 3 and numbers["num_detections"] == 15
    assert (tmp_path / "weights0").read_text() == (tmp_path / "weights1").read_text()
