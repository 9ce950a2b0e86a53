"""`eval/classification/corruptions.py` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.evaluation.summary import headline_numbers

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "classification" / "corruptions.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return dark and bright noise: clean, `same` as it is, and `inverted`, so that every answer is wrong."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for place, count in (("train", 12), ("val", 6), ("c/same/1", 3), ("c/same/3", 3), ("c/inverted/5", 3)):
        for label, low in (("bright", 150), ("dark", 0)):
            (root / place / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 100, (40, 48, 3), dtype=np.uint8)
                pixels = 255 - pixels if "inverted" in place else pixels
                Image.fromarray(pixels).save(root / place / label / f"{number}.png")
    return root


def test_errors_are_not_those_of_each_corruption(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--weights", "pixels", "--size", "32", "--epochs", "8", "--data", str(folder))
    places = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert script.main([*words, "--corrupted", str(folder / "c"), *places]) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    numbers = document["numbers"]["pixels"]
    assert numbers["clean"] == 0
    assert numbers["errors"] == {"inverted": {"5": 1.0}, "same": {"1": 0.0, "3": 0.0}}
    assert numbers["mean_error"] == 0.5 and numbers["mce"] is None
    assert headline_numbers(document) == {"clean error": 0.0, "corrupted error": 0.5}
    shown = capsys.readouterr().out
    assert "No mCE" in shown and "inverted" in shown


def test_folder_that_is_no_image_net_c_gives_a_traceback(
    tmp_path: Path, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--weights", "pixels", "--data", str(folder), "--corrupted", str(folder / "val"))
    assert script.main([*words, "--output", str(tmp_path)]) == 2
    assert "expected <corruption>/<severity 1 to 5>/<class>" in capsys.readouterr().err
