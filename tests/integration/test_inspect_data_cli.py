"""The command that says what is in a data set."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data import inspect as inspect_data
from dinov2_equi.data.augmentations import Crops
from dinov2_equi.data.contact_sheet import contact_sheet
from dinov2_equi.data.inspect import main


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_data, "SPEED_IMAGES", 2)


def test_counts_sizes_bad_files_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        path = tmp_path / "photos" / ("cat" if number % 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).convert("L" if number == 5 else "RGB").save(path)
    (tmp_path / "photos" / "dog" / "0.png").write_bytes(b"")
    assert main([str(tmp_path / "photos"), "--sheet", str(tmp_path / "out" / "sheet.png"), "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 images, ") and lines[0].endswith(" kB")
    assert lines[1:4] == [
        "2 classes of 2 to 4 images, median 3: cat, dog",
        "1 of 6 headers promise no image to train on; 20 at most are read",
        "6 of them read: 1 bad, 1 grey",
    ]
    assert lines[4].startswith("bad: ") and "0.png: UnidentifiedImageError" in lines[4]
    assert lines[5] == (
        "pixels, by 5 headers: width 51 to 55, height 40, shorter side 40, median 40; 5 with a shorter side below the "
        "224 of a global crop"
    )
    assert "images/s for each loader process" in lines[6]
    assert Image.open(tmp_path / "out" / "sheet.png").size == (11 * 164, 2 * 164)


def test_the_bad_one_among_many_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        Image.new("RGB", (40, 1 if number == 17 else 40)).save(tmp_path / f"{number:02}.png")
    assert main([str(tmp_path), "--images", "3", "--sheet", str(tmp_path / "sheet.png"), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "3 of them read: 1 bad, 2 grey" in out and "17.png: 40 x 1 pixels" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/here"], "no such folder"),
        (["synthetik"], "did you mean 'synthetic'"),
        (["synthetic", "--sheet", "x.pdf"], "must end in .png"),
        (["synthetic", "--rows", "0"], "--rows >= 1"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_sheet_keeps_shapes_and_places() -> None:
    source = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    source[1:] = 0
    crops = Crops(torch.zeros(2, 3, 8, 8), torch.full((1, 3, 4, 4), 0.5))
    sheet = contact_sheet([source, source], [crops, crops], tile=40)
    assert sheet.shape == (88, 176, 3) and sheet.dtype == torch.uint8
    assert sheet[22, 22].tolist() == [255, 0, 0]  # the image, red, half as high as its tile
    assert sheet[5, 22].tolist() == [255, 255, 255]
    assert sheet[66, 66].tolist() == [0, 0, 0] and sheet[66, 154].tolist() == [128, 128, 128]


def test_images_of_five_channels_are_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((5, 40, 50), number, np.uint8))
    sheet = ["--sheet", str(tmp_path / "sheet.png"), "--rows", "1"]
    assert main([str(tmp_path), "--in-channels", "5", *sheet]) == 0
    assert "3 of them read: 0 bad, 3 grey" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").size == (11 * 164, 164)


@pytest.mark.parametrize("is_module", [True, False])
def test_the_command_starts_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_module: bool
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "argv", ["inspect", "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "dinov2_equi.data.inspect")
    with pytest.raises(SystemExit, match="0"):
        if is_module:
            runpy.run_module("dinov2_equi.data.inspect", run_name="__main__")
        else:
            runpy.run_path(str(root / "dinov2_equi" / "run" / "inspect_data.py"), run_name="__main__")
    assert "python -m dinov2_equi.data.inspect /data/photos" in capsys.readouterr().out
