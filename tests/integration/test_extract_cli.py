"""`run/extract.py`: the backbone's features beside the names of their images, in each kind of file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.run.extract import main
from dinov2_equi.run.load import load_eval_model

WEIGHTS = "random:vit_test_tiny/8"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(("z.png", "b/a.png", "c.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def read(path: Path) -> tuple[list[str], Tensor]:
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        return content["names"], content["features"]
    if path.suffix == ".npy":
        return path.with_suffix(".txt").read_text().splitlines(), torch.from_numpy(np.load(path))
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    return table["name"].to_pylist(), torch.tensor(table["features"].to_pylist())


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".parquet"])
@pytest.mark.parametrize("features", ["cls", "both"])
def test_file_holds_other_features_or_names(
    photos: Path, tmp_path: Path, suffix: str, features: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "new" / f"f{suffix}"
    words = [str(photos), "--weights", WEIGHTS, "--size", "32", "--features", features, "--batch-size", "2"]
    assert main([*words, "--out", str(out)]) == 0
    names, found = read(out)
    assert names == ["b/a.png", "c.png", "z.png"]
    expected = load_eval_model(WEIGHTS, size=32).features(eval_images(make_dataset(str(photos)), 32, 3), device="cpu")
    wanted = torch.cat([expected["cls"], expected["patch_mean"]], dim=1) if features == "both" else expected["cls"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert f"3 images, {wanted.shape[1]} features each" in capsys.readouterr().out
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PHOTOS", "--weights", WEIGHTS, "--out", "f.csv"], "must end in .parquet, .npy, .pt, got f.csv"),
        (["nowhere/", "--weights", WEIGHTS, "--out", "f.pt"], "no such folder: nowhere"),
        (["PHOTOS", "--weights", "nothing", "--out", "f.pt"], "there is no file 'nothing'"),
        (["PHOTOS", "--weights", WEIGHTS, "--features", "invariant", "--out", "f.pt"], "no features 'invariant'"),
        (["PHOTOS", "--weights", WEIGHTS, "--size", "33", "--out", "f.pt"], "multiple of its patch size 8"),
    ],
)
def test_wrong_input_gives_a_traceback(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("PHOTOS", str(photos)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_missing_pyarrow_is_noticed_after_the_images_were_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # an import of it fails
    monkeypatch.setattr("dinov2_equi.run.extract.make_dataset", lambda spec: pytest.fail("images were read"))
    assert main([str(photos), "--weights", WEIGHTS, "--out", str(tmp_path / "f.parquet")]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
