"""A training among bad images: it goes on, lists them, and stops where there are too many."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve good images and four empty files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        path = folder / f"{number:02d}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if number % 4 == 0:
            path.write_bytes(b"")
    return folder


def listed(run: Path) -> list[str]:
    return sorted(Path(json.loads(line)["path"]).name for line in (run / "bad_images.jsonl").read_text().splitlines())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_past_bad_images_and_lists_each_once(
    tmp_path: Path, photos: Path, lean_run: Run, num_workers: int
) -> None:
    settings = (f"train.dataset_path={photos}", f"train.num_workers={num_workers}", "data.holdout_fraction=0")
    assert lean_run(tmp_path / "run", *settings, "train.OFFICIAL_EPOCH_LENGTH=4") == 0
    assert listed(tmp_path / "run") == ["00.png", "04.png", "08.png", "12.png"]


def test_image_that_can_be_read_but_not_used_is_listed_without_its_folder(
    tmp_path: Path, photos: Path, lean_run: Run
) -> None:
    (tmp_path / "more").mkdir()
    for number in range(16):
        Image.new("RGB", (400, 10) if number % 2 else (40, 40)).save(tmp_path / "more" / f"strip{number}.png")
    data = f"train.dataset_path=mix:{photos} + {tmp_path / 'more'}"
    settings = (data, "data.holdout_fraction=0.1", "train.OFFICIAL_EPOCH_LENGTH=8")
    assert lean_run(tmp_path / "run", *settings, "data.max_bad_fraction=1") == 0
    paths = [Path(json.loads(line)["path"]) for line in (tmp_path / "run" / "bad_images.jsonl").open()]
    assert any(path.name.startswith("strip") for path in paths) and all(path.is_file() for path in paths)


def test_bad_held_back_images_do_not_spoil_the_report(tmp_path: Path, photos: Path, debug_run: Run) -> None:
    settings = (f"train.dataset_path={photos}", "data.holdout_fraction=0.5", "evaluation.probe=true")
    small = [f"evaluation.probe_{what}" for what in ("epochs=1", "train_pairs=16", "test_pairs=16")]
    assert debug_run(tmp_path / "run", *settings, *small) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_too_many_bad_images_stop_the_run_which_goes_on_once_more_are_allowed(
    tmp_path: Path, photos: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (f"train.dataset_path={photos}", "data.holdout_fraction=0", "train.OFFICIAL_EPOCH_LENGTH=4")
    assert lean_run(tmp_path / "run", *data, "data.max_bad_fraction=0.001") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        re.match(r"error: \d+ of the \d+ images read so far cannot be used", message) and "bad_images.jsonl" in message
    )
    assert lean_run(tmp_path / "run", *data, "data.max_bad_fraction=1") == 0
    assert len(listed(tmp_path / "run")) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_of_bad_images_alone_is_refused_with_a_whole_message(
    tmp_path: Path, lean_run: Run, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no image")
    settings = (f"train.dataset_path={tmp_path / 'photos'}", f"train.num_workers={num_workers}")
    assert lean_run(tmp_path / "run", *settings) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: none of 64 images in a row can be used") and "a.jpg" in message


def test_a_new_run_in_the_folder_lists_its_bad_images_again(tmp_path: Path, photos: Path, lean_run: Run) -> None:
    settings = (f"train.dataset_path={photos}", "data.holdout_fraction=0", "train.OFFICIAL_EPOCH_LENGTH=4")
    assert lean_run(tmp_path / "run", *settings) == 0
    first = listed(tmp_path / "run")
    assert first and lean_run(tmp_path / "run", *settings, "--no-resume") == 0
    assert listed(tmp_path / "run" / "set_aside" / "1") == first == listed(tmp_path / "run")
