"""`eval/video/run.py` as a user types it, on small copies of the layouts of DAVIS and VIP."""

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

from dinov2_equi.evaluation.mask_pictures import write_index_mask

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "video" / "run.py"
TINY = ("--weights", "random:vit_test_tiny/8", "--device", "cpu")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


def write_clip(frames: Path, masks: Path, seed: int, count: int = 4) -> None:
    """Write a bright square of two objects that moves over noise, 40 x 60 pixels."""
    rng = np.random.default_rng(seed)
    frames.mkdir(parents=True)
    for t in range(count):
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[8 : 8 + 16, 4 + 5 * t : 4 + 5 * t + 16] = 1
        mask[24:34, 4 + 5 * t : 4 + 5 * t + 16] = 2
        pixels = rng.integers(0, 90, (40, 60, 3)) + 80 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(frames / f"{t:05d}.jpg")
        write_index_mask(masks / f"{t:05d}.png", mask)


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("DAVIS")
    for seed, name in enumerate(("bear", "car", "left-out")):
        write_clip(root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name, seed)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("bear\ncar\n")
    return root


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def test_davis_is_not_measured_or_measured_twice(
    tmp_path: Path, script: ModuleType, davis: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = [*TINY, "--data", str(davis), "--size", "40", "--output", str(tmp_path / "out")]
    assert script.main(arguments) == 0
    document = results(tmp_path / "out")
    (numbers,) = document["numbers"].values()
    assert document["task"] == "video" and document["settings"]["settings"]["propagation"]["top_k"] == 7
    assert set(numbers["clips"]) == {"bear", "car"}
    assert numbers["clips"]["car"]["num_frames"] == 4 and numbers["clips"]["car"]["num_scored"] == 2
    assert 0 <= numbers["J&F"] <= 1 and numbers["J&F"] == pytest.approx((numbers["J"] + numbers["F"]) / 2)
    means = [numbers["clips"][name]["J"] for name in ("bear", "car")]
    assert numbers["J"] == pytest.approx(sum(means) / 2)  # two objects in each
    assert numbers["copy_first_mask"]["J"] == pytest.approx(numbers["clips"]["car"]["copy_first_mask"]["J"])
    place = tmp_path / "out" / "random_vit_test_tiny_8"
    assert len(list((place / "masks" / "bear").glob("*.png"))) == 4
    assert {path.stem for path in (place / "pictures").iterdir()} == {"bear", "car"}
    assert not list((place / "partial").iterdir())
    assert "copy the first mask" in capsys.readouterr().out

    (place / "clips" / "car.json").unlink()  # as if killed in it
    measured = []
    segment = script.measure_clip.__globals__["segment_clip"]
    monkeypatch.setitem(
        script.measure_clip.__globals__,
        "segment_clip",
        lambda model, clip, *rest, **options: measured.append(clip.name) or segment(model, clip, *rest, **options),
    )
    assert script.main(arguments) == 0
    assert measured == ["car"] and results(tmp_path / "out")["numbers"] == document["numbers"]


def test_defaults_of_davis_are_not_those_of_the_literature(script: ModuleType, davis: Path) -> None:
    settings = script.video_settings(script.get_parser().parse_args([*TINY, "--data", str(davis)]))
    propagation = settings.propagation
    assert (settings.size, settings.metric) == (480, "j_and_f")
    assert (propagation.top_k, propagation.radius, propagation.temperature, propagation.context) == (7, 20, 0.7, 20)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_measure_a_clip_twice_or_otherwise(
    tmp_path: Path, script: ModuleType, davis: Path, run_on_ranks: Callable[[int, Callable[[], int]], list[int]]
) -> None:
    words = [*TINY, "--data", str(davis), "--size", "40", "--output"]
    assert script.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: script.main([*words, str(tmp_path / "two")])) == [0, 0]
    assert results(tmp_path / "two")["numbers"] == results(tmp_path / "one")["numbers"]
    assert results(tmp_path / "two")["settings"]["num_processes"] == 2


def test_a_signal_in_a_clip_ends_in_a_traceback_or_loses_the_clip(
    tmp_path: Path, script: ModuleType, davis: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--data", str(davis), "--size", "40", "--batch-size", "1", "--output"]
    assert script.main([*words, str(tmp_path / "whole")]) == 0
    library = script.measure_clip.__globals__
    monkeypatch.setitem(library, "SAVE_EVERY", 1)
    write, written = library["write_index_mask"], []

    def write_and_signal(path: Path, mask: np.ndarray) -> None:
        write(path, mask)
        written.append(path.name)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setitem(library, "write_index_mask", write_and_signal)
    assert script.main([*words, str(tmp_path / "cut")]) == 75
    assert "stopped by SIGUSR2; the same command goes on" in capsys.readouterr().err
    assert script.main([*words, str(tmp_path / "cut")]) == 0
    assert written == [f"{t:05d}.png" for t in (0, 1, 2, 3, 0, 1, 2, 3)]  # the first clip went on, no frame twice
    assert results(tmp_path / "cut")["numbers"] == results(tmp_path / "whole")["numbers"]


def test_vip_is_not_scored_by_class(tmp_path: Path, script: ModuleType) -> None:
    root = tmp_path / "VIP" / "VIP_Fine"
    for seed, name in enumerate(("videos1", "videos2")):
        write_clip(root / "Images" / name, root / "Annotations" / "Category_ids" / name, seed, count=3)
    (root / "lists").mkdir()
    (root / "lists" / "val_videos.txt").write_text("videos2\n")
    arguments = [*TINY, "--dataset", "vip", "--data", str(root.parent), "--output", str(tmp_path / "out")]
    assert script.main([*arguments, "--size", "40", "--protocol", "cropmae", "--context", "2"]) == 0
    document = results(tmp_path / "out")
    (numbers,) = document["numbers"].values()
    assert set(numbers["clips"]) == {"videos2"} and 0 < numbers["mIoU"] <= 1
    assert document["settings"]["settings"]["metric"] == "miou"
    assert script.video_settings(script.get_parser().parse_args(arguments)).size == 560


def test_any_clip_with_one_mask_is_refused(tmp_path: Path, script: ModuleType) -> None:
    write_clip(tmp_path / "clip", tmp_path / "masks", 0)
    arguments = ["--dataset", "folder", "--data", str(tmp_path / "clip"), "--output", str(tmp_path / "out")]
    weights = ["--weights", "random:vit_test_tiny/8", "pixels", "--size", "40"]
    assert script.main([*weights, *arguments, "--masks", str(tmp_path / "masks" / "00000.png")]) == 0
    document = results(tmp_path / "out")
    assert set(document["numbers"]) == {"random:vit_test_tiny/8", "pixels"}
    for numbers in document["numbers"].values():
        assert numbers["J&F"] is None and numbers["clips"]["clip"]["num_scored"] == 0  # nothing to compare with
    assert len(list((tmp_path / "out" / "pixels" / "masks" / "clip").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (("--data", "no/such/folder"), "davischallenge.org"),
        (("--dataset", "vip"), "sysu-hcp.net"),
        (("--dataset", "folder"), "needs --masks"),
        (("--clips", "bera"), "the nearest are bear"),
        (("--weights", "no_such_file.pth"), "no_such_file.pth"),
        (("--features", "equivariant"), "it has patches"),
        (("--temperature", "0"), "temperature > 0"),
        (("--size", "1", "2", "3"), "got 3 numbers"),
    ],
)
def test_a_fault_of_the_input_is_not_said_plainly_or_leaves_files(
    tmp_path: Path,
    script: ModuleType,
    davis: Path,
    capsys: pytest.CaptureFixture[str],
    faulty: tuple[str, ...],
    message: str,
) -> None:
    assert script.main([*TINY, "--data", str(davis), "--output", str(tmp_path / "out"), *faulty]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_a_config_beside_the_script_is_refused_or_says_other_than_the_defaults(script: ModuleType, path: Path) -> None:
    assert path.read_text().startswith("# Purpose   ")
    words = ["--weights", "x", "--data", "x"]
    read = script.get_parser().parse_args([*words, "--config", str(path)])
    plain = script.get_parser().parse_args([*words, "--dataset", read.dataset])
    assert read.dataset == path.stem and script.video_settings(read) == script.video_settings(plain)
