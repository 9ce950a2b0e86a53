"""`run/visualize.py`: its pictures and its page, for a run and for a bare backbone."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.run.visualize import main

WEIGHTS = "random:vit_test_tiny/8"


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = []
    for number, name in enumerate(("one.png", "b/two.png", "b/one.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return paths


def test_backbone_is_shown_without_a_picture(photos: list[str], tmp_path: Path) -> None:
    assert main([*photos, "--weights", WEIGHTS, "--size", "32", "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stems = ("one", "two", "one_3")
    assert names == {"index.html", *(f"{stem}_{what}.png" for stem in stems for what in ("pca", "attention"))}
    with Image.open(tmp_path / "out" / "one_pca.png") as picture:
        assert picture.size == (448, 448)
    with Image.open(tmp_path / "out" / "one_attention.png") as picture:
        assert picture.size == (4 * 448 + 3 * 6, 448)  # the mean and three heads
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data-directions=") == 3
    assert "Between the views" not in page
    assert not re.search(r"(src|href)=.?https?:", page)  # nothing is fetched from elsewhere
    directions = base64.b64decode(re.findall(r'data-directions="([^"]+)"', page)[0])
    assert len(directions) == 16 * int(re.findall(r'data-dim="(\d+)"', page)[0])


def test_run_is_shown_without_its_reconstructions(
    photos: list[str], tmp_path: Path, lean_run: Callable[..., int]
) -> None:
    run = tmp_path / "run"
    assert lean_run(run, "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1") == 0
    assert main([*photos, "--weights", str(run), "--size", "32", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "equivariance.png").is_file()
    assert "Between the views" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.jpg"], "no such file: nothing.jpg"),
        (["PHOTO", "--size", "33"], "multiple of its patch size 8"),
    ],
)
def test_wrong_input_gives_a_traceback(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    arguments = [word.replace("PHOTO", photos[0]) for word in words]
    assert main([*arguments, "--weights", WEIGHTS, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
