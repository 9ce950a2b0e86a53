"""`eval/homography/run.py` as a user types it."""

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
from PIL import Image

from dinov2_equi.evaluation.dense import training

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "homography" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu", "--steps", "4", "--batch-size", "4", "--width", "8")
SMALL = ("--image-size", "48", "64", "--patch", "24", "--max-shift", "6", "--test-pairs", "6")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return train/ and val/ of images of several shapes, one of them grey."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / part).mkdir()
        for number, shape in enumerate(((30, 50, 3), (60, 40, 3), (48, 64))):
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / part / f"{number}.png")
    return root


def results(place: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((place / "results.json").read_text())
    return document


def test_homographies_are_not_measured_or_learnt_twice(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = [*TINY, *SMALL, "--data", str(folder), "--save-every", "2", "--output", str(tmp_path / "out")]
    assert script.main(arguments) == 0
    document = results(tmp_path / "out")
    (numbers,) = document["numbers"].values()
    assert document["task"] == "homography" and document["settings"]["settings"]["pairs"]["patch"] == 24
    assert 0 < numbers["mean_corner_error"] < 100 and 3 < numbers["identity_corner_error"] < 6  # 0.77 of 6 pixels
    assert len(numbers["train_loss"]) == 4
    assert (tmp_path / "out" / "random_vit_test_tiny_8" / "pairs.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing moved" in capsys.readouterr().out

    monkeypatch.setattr(training, "_step", None)  # a step would fail
    assert script.main(arguments) == 0
    assert results(tmp_path / "out")["numbers"] == document["numbers"]
    assert script.main([*arguments, "--lr", "0.5"]) == 2
    assert "holds a training that differs in loop, settings" in capsys.readouterr().err


def test_the_layout_of_coco_is_not_known(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train2017").symlink_to(folder / "train")
    (tmp_path / "val2017").symlink_to(folder / "val")
    train, test = script.find_images(script.get_parser().parse_args([*TINY, "--data", str(tmp_path)]))
    assert len(train) == len(test) == 3
    faulty = ["--train", str(tmp_path / "nowhere"), "--test", str(folder / "val"), "--output", str(tmp_path / "out")]
    assert script.main([*TINY, *faulty]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in error and "https://cocodataset.org" in error and error.count("\n") == 1


def test_another_backbone_is_measured_on_other_pairs(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    weights = ["--weights", "random:vit_test_tiny/8", "pixels", "--seed", "5"]
    data = ["--train", str(folder / "train"), "--test", str(folder / "val")]
    assert script.main([*TINY, *SMALL, *weights, *data, "--output", str(tmp_path / "out")]) == 0
    numbers = results(tmp_path / "out")["numbers"]
    assert set(numbers) == {"random:vit_test_tiny/8", "pixels"}
    assert len({found["identity_corner_error"] for found in numbers.values()}) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_number_of_processes_changes_what_is_measured(
    tmp_path: Path,
    script: ModuleType,
    folder: Path,
    is_stopped: bool,
    run_on_ranks: Callable[[int, Callable[[], int]], list[int]],
) -> None:
    arguments = [*TINY, *SMALL, "--data", str(folder), "--backbone-lr", "1e-4", "--test-pairs", "5", "--width", "16"]
    arguments.append("--output")
    assert script.main([*arguments, str(tmp_path / "one")]) == 0

    def stopped() -> int:
        step = training._step

        def step_and_signal(*arguments: Any) -> training.Losses:
            if arguments[-1] == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        training._step = step_and_signal
        return int(script.main([*arguments, str(tmp_path / "two")]))

    if is_stopped:
        assert run_on_ranks(2, stopped) == [75, 75]
        assert not (tmp_path / "two" / "results.json").exists()
    assert run_on_ranks(2, lambda: script.main([*arguments, str(tmp_path / "two")])) == [0, 0]
    (one,), (two,) = (results(tmp_path / name)["numbers"].values() for name in ("one", "two"))
    assert one["num_test_pairs"] == two["num_test_pairs"] == 5
    # Sums in another order, carried through four steps.
    assert two["mean_corner_error"] == pytest.approx(one["mean_corner_error"], rel=1e-4)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (("--data", "no/such/folder"), "no/such/folder/train or no/such/folder/train2017 and no/such/folder/val"),
        (("--data", "no/such/folder"), "https://cocodataset.org"),
        (("--train", "sample_photos"), "both --train and --test"),
        (("--weights", "no_such_file.pth"), "no_such_file.pth"),
        (("--features", "invariant"), "it has patches"),
        (("--max-shift", "7"), "quarter of the patch"),
        (("--save-every", "0"), "at least 1 step"),
        (("--batch-size", "3", "--tasks-per-node", "2"), "images of all processes: take a multiple of 2"),
    ],
)
def test_a_fault_of_the_input_is_not_said_plainly_or_leaves_files(
    tmp_path: Path,
    script: ModuleType,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    faulty: tuple[str, ...],
    message: str,
) -> None:
    arguments = [*TINY, *SMALL, "--data", str(folder), "--output", str(tmp_path / "out"), *faulty]
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dense(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT.with_name("dense_equivariance.py"))


def test_dense_features_are_not_measured_by_family(
    tmp_path: Path, dense: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", "random:vit_test_tiny/8", "pixels", "--size", "32", "--device", "cpu"]
    data = ["--data", str(folder / "train"), "--families", "rotation", "blur", "--batch-size", "2"]
    assert dense.main([*weights, *data, "--output", str(tmp_path / "out")]) == 0
    document = results(tmp_path / "out")
    assert document["task"] == "dense_equivariance"
    assert set(document["numbers"]) == {"random:vit_test_tiny/8", "pixels"}
    for numbers in document["numbers"].values():
        assert set(numbers) == {"rotation", "blur"}
        assert numbers["blur"]["moved"] == numbers["blur"]["unmoved"]  # blur moves nothing
        assert -1 <= numbers["rotation"]["moved_centred"] <= 1
    assert (tmp_path / "out" / "pixels" / "features.png").read_bytes().startswith(b"\x89PNG")
    assert "left in place" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("faulty", "message"),
    [(("--size", "20"), "try 16 or 24"), (("--images", "1"), "at least two images"), (("--data", "a/b"), "a/b")],
)
def test_a_fault_of_the_dense_measurement_is_not_said_plainly(
    tmp_path: Path,
    dense: ModuleType,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    faulty: tuple[str, ...],
    message: str,
) -> None:
    arguments = ["--weights", "random:vit_test_tiny/8", "--data", str(folder / "train"), "--device", "cpu", *faulty]
    assert dense.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_a_config_beside_the_script_is_refused(script: ModuleType, path: Path) -> None:
    assert path.read_text().startswith("# Purpose   ")
    words = ["--weights", "x", "--data", "x"]
    found = script.homography_settings(script.get_parser().parse_args([*words, "--config", str(path)]))
    is_default = found == script.homography_settings(script.get_parser().parse_args(words))
    assert is_default == (path.stem == "s_coco")
