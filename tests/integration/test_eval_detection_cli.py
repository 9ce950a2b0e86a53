"""`eval/detection/run.py` as a user types it."""

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

from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.summary import headline_numbers
from dinov2_equi.fsdp.checkpoint import CheckpointStore

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "detection" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/16", "--device", "cpu", "--set", "batch_size=2")
RECIPE = (
    "save_every=1",
    "size=64",
    "channels=8",
    "anchor_size=16",
    "steps=4",
    "warmup_steps=1",
    "batch_size=2",
    "detections=5",
)


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return images with a bright square each, in COCO's layout."""
    root = tmp_path_factory.mktemp("detection")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            pixels = np.zeros((48, 64, 3), np.uint8)
            x, y = (int(v) for v in rng.integers(0, 20, 2))
            pixels[y : y + 24, x : x + 30] = 255
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            outline = [[x, y, x + 30, y, x + 30, y + 24, x, y + 24]]
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, 30, 24], "segmentation": outline}
            )
        document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def test_precision_or_files_are_missing(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    assert script.main([*TINY, *RECIPE, "--data", str(folder), "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["task"] == "detection" and set(headline_numbers(document)) == {"box AP", "mask AP"}
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 200


def test_stopped_run_ends_with_other_numbers(
    script: ModuleType, folder: Path, assert_resumes: Callable[..., None]
) -> None:
    recipe = (*RECIPE, "detector=retinanet", "steps=3", "save_every=2", "finetune=true", "curve_every=1")
    words = (*TINY, *recipe, "--data", str(folder))
    assert_resumes(script, script.DetectionModel, words, stop_at=3)


def test_curve_or_its_picture_is_missing(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    """Measuring on the way must not change the training, and the linear probe is trained as any other detector."""
    found = []
    for name, words in (("plain", ()), ("measured", ("curve_every=2",))):
        recipe = (*RECIPE, "detector=linear", *words)
        assert script.main([*TINY, *recipe, "--data", str(folder), "--output", str(tmp_path / name)]) == 0
        (numbers,) = json.loads((tmp_path / name / "results.json").read_text())["numbers"].values()
        found.append(numbers)
        with Image.open(tmp_path / name / "curve.png") as picture:
            assert picture.width > 200
    assert [numbers.pop("curve")["step"] for numbers in found] == [[4], [2, 4]]
    assert found[0] == found[1]


def test_a_kill_while_it_is_measured_loses_the_steps_or_a_point_of_the_curve(
    tmp_path: Path, script: ModuleType, folder: Path, interrupted_at: Callable[..., Any]
) -> None:
    words = (*TINY, *RECIPE, "detector=linear", "save_every=2", "curve_every=2", "--data", str(folder))
    assert script.main([*words, "--output", str(tmp_path / "whole")]) == 0
    with interrupted_at(script.DetectionTask, "evaluate", 1):
        assert script.main([*words, "--output", str(tmp_path / "cut")]) == 130
    assert CheckpointStore(tmp_path / "cut" / "checkpoints", read_only=True).latest_step() == 2
    assert script.main([*words, "--output", str(tmp_path / "cut")]) == 0
    found = [json.loads((tmp_path / name / "results.json").read_text())["numbers"] for name in ("whole", "cut")]
    assert found[0] == found[1]


def test_other_steps_of_measurement_are_refused_by_a_stopped_training(
    tmp_path: Path, script: ModuleType, folder: Path, interrupted_at: Callable[..., Any]
) -> None:
    """What was measured before the stop stays on the curve; steps that were left out are not made up for."""
    words = (*TINY, *RECIPE, "detector=linear")
    rest = ("--data", str(folder), "--output", str(tmp_path))
    with interrupted_at(script.DetectionModel, "losses", 3):
        assert script.main([*words, "curve_every=1", *rest]) == 130
    assert script.main([*words, "curve_every=3", *rest]) == 0
    (numbers,) = json.loads((tmp_path / "results.json").read_text())["numbers"].values()
    assert numbers["curve"]["step"] == [1, 2, 3, 4]


def test_files_that_lie_elsewhere(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    sets = [(str(folder / f"annotations/instances_{s}.json"), str(folder / s)) for s in ("train", "val")]
    words = ("steps=2", "detector=retinanet", "--train", *sets[0], "--val", *sets[1], "--output", str(tmp_path))
    assert script.main([*TINY, *RECIPE, *words]) == 0
    (numbers,) = json.loads((tmp_path / "results.json").read_text())["numbers"].values()
    assert set(numbers) == {"num_images", "num_detections", "box", "coco_eval", "curve", "train_loss"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --data FOLDER alone, or both --train JSON IMAGES and --val JSON IMAGES"),
        (("--data", "nowhere"), "no train images with annotations in nowhere"),
        (("--train", "a.json", "b"), "both --train JSON IMAGES and --val"),
        (("--data", ".", "--set", "detectors=yolo"), "did you mean detector?"),
    ],
)
def test_wrong_input_gives_a_traceback(
    script: ModuleType, tmp_path: Path, assert_refused: Callable[..., None], words: tuple[str, ...], message: str
) -> None:
    given = ["--weights", "random:vit_test_tiny/16", *words, "--output", str(tmp_path / "out")]
    assert_refused(script, given, message)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(), "of the processor"])
def test_out_of_memory_is_not_explained(
    script: ModuleType,
    folder: Path,
    tmp_path: Path,
    assert_refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | str,
) -> None:
    def losses(*_: object) -> object:
        if isinstance(error, str):
            return torch.empty(2**50, dtype=torch.uint8)  # a petabyte: more than any machine can address
        raise error

    monkeypatch.setattr(script.DetectionModel, "losses", losses)
    message = (
        "there is not enough memory: lower batch_size (now 2), or lower size (now 64), or attend in windows "
        "(window=14), or lower regions (now 512), by --set"
    )
    assert_refused(script, [*TINY, *RECIPE, "--data", str(folder), "--output", str(tmp_path)], message)


def test_other_error_is_taken_for_memory(
    script: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(*_: object) -> object:
        raise RuntimeError("something else")

    monkeypatch.setattr(script.DetectionModel, "losses", losses)
    with pytest.raises(RuntimeError, match="something else"):
        script.main([*TINY, *RECIPE, "--data", str(folder), "--output", str(tmp_path)])


def test_windows_of_another_library_are_taken(
    script: ModuleType, folder: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    words = ["--weights", "pixels", "--device", "cpu", "--set", *RECIPE, "window=2", "--data", str(folder)]
    assert_refused(script, [*words, "--output", str(tmp_path)], "pixels is no backbone of DINOv2's architecture")


def test_file_is_not_held_against_itself(
    load_script: Callable[[Path], ModuleType],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    assert_refused: Callable[..., None],
) -> None:
    check = load_script(SCRIPT.parent / "check_annotations.py")
    output = tmp_path / "check.json"
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)  # files of the same names
    again = [str(folder / "annotations/instances_val.json"), str(folder / "val")]
    assert check.main(["--data", str(folder), str(other), "--file", *again, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("box AP 1.000000000000, mask AP 1.000000000000") == 4
    numbers = json.loads(output.read_text())["numbers"]
    assert len(numbers) == 4
    assert all(found["mask"]["pycocotools"]["AP"] == 1.0 for found in numbers.values())
    assert_refused(check, ["--data", str(tmp_path)], "no val images with annotations")
    assert_refused(check, [], "give --data FOLDER ... or --file JSON IMAGES")


def test_file_without_objects_hides_a_wrong_one_or_is_wrong(
    load_script: Callable[[Path], ModuleType], folder: Path, tmp_path: Path
) -> None:
    check = load_script(SCRIPT.parent / "check_annotations.py")
    document = json.loads((folder / "annotations/instances_val.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(document | {"annotations": []}))
    empty = ["--file", str(tmp_path / "empty.json"), str(folder / "val")]
    assert check.main([*empty, "--data", str(folder), "--output", str(tmp_path / "check.json")]) == 0


def test_check_does_not_notice_a_wrong_number(
    load_script: Callable[[Path], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load_script(SCRIPT.parent / "check_annotations.py")
    monkeypatch.setattr(check, "perfect_detections", lambda dataset, kind: [])
    assert check.main(["--data", str(folder), "--output", str(tmp_path / "check.json")]) == 1


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_config_beside_the_script_is_refused(script: ModuleType, path: Path) -> None:
    read_settings(script.DetectionSettings, path, []).check()
    assert path.read_text().startswith("# Purpose   ")
