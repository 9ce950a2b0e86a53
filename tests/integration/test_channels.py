"""Training on images that are no photographs, and what can be done with such a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dinov2_equi.run.export import main as export
from dinov2_equi.run.load import load_run

Run = Callable[..., int]
REPOSITORY = Path(__file__).resolve().parents[2]
FIVE = ("data.in_channels=5", "data.mean=[0.5,0.5,0.5,0.5,0.5]", "data.std=[0.3,0.3,0.3,0.3,0.3]")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve npy files of five channels in two classes, 16 bits."""
    folder = tmp_path_factory.mktemp("arrays")
    for number in range(12):
        (folder / f"class{number % 2}").mkdir(exist_ok=True)
        values = np.random.default_rng(number).integers(0, 2**16, (5, 40, 48), np.uint16)
        np.save(folder / f"class{number % 2}" / f"{number}.npy", values)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, arrays: Path, debug_run: Run) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "five"
    small = ("train.OFFICIAL_EPOCH_LENGTH=2", "evaluation.probe_epochs=1", "data.holdout_fraction=0.25")
    assert debug_run(folder, f"train.dataset_path={arrays}", *FIVE, *small) == 0
    return folder


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
@pytest.mark.parametrize("decoder", ["transformer", "upconv"])
def test_training_on_five_channels_ends_like_any_other(
    tmp_path: Path, arrays: Path, lean_run: Run, augment_on: str, decoder: str
) -> None:
    keys = ("train.OFFICIAL_EPOCH_LENGTH=1", f"data.augment_on={augment_on}", f"equi.decoder.type={decoder}")
    assert lean_run(tmp_path / "run", f"train.dataset_path={arrays}", *FIVE, *keys) == 0


def test_report_checkpoint_and_teacher_are_there_and_read_five_channels(run: Path) -> None:
    assert (run / "report.html").is_file() and list((run / "checkpoints").iterdir())
    model = load_run(run)
    assert model.mean == (0.5,) * 5 and model.tokens(torch.rand(2, 5, 32, 32)).cls.shape[0] == 2
    with pytest.raises(ValueError, match="reads images of 5 channels, these have 3"):
        model.tokens(torch.rand(2, 3, 32, 32))


def test_the_backbone_is_exported(run: Path, tmp_path: Path) -> None:
    assert export(["--weights", str(run), "--output", str(tmp_path), "--formats", "safetensors", "torchscript"]) == 0


def test_the_mean_of_three_channels_and_colours_are_refused_before_anything_is_built(
    tmp_path: Path, arrays: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"train.dataset_path={arrays}"
    for keys, message in (
        (("data.in_channels=5",), "data.mean must be 5 numbers (data.in_channels is 5), got [0.485, 0.456, 0.406]"),
        ((*FIVE, "equi.family=color"), "changes hue and saturation, which only photographs have"),
        ((*FIVE, "equi.family=mixture"), "choose among rotation, translation, se2, blur"),
        (("data.value_range=[0,65535]", "equi.family=color"), "which only photographs have"),
        ((*FIVE, "train.dataset_path=synthetic"), "synthetic holds photographs of red, green and blue alone"),
    ):
        assert lean_run(tmp_path / "run", data, *keys) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_channels(
    run: Path, arrays: Path, lean_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lean_run(run, f"train.dataset_path={arrays}", *FIVE, "data.value_range=[0,1]") == 2
    assert "data.value_range: was [], now [0.0, 1.0]" in capsys.readouterr().err


def test_statistics_of_a_data_set_are_printed_as_its_configuration(
    arrays: Path, load_script: Callable[[Path], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = load_script(REPOSITORY / "scripts" / "dataset_stats.py")
    assert script.main([str(arrays), "--in-channels", "5", "--value-range", "0", "65535"]) == 0
    lines = capsys.readouterr().out.splitlines()
    pixels = np.stack([np.load(file) for file in sorted(arrays.rglob("*.npy"))]) / 65535
    assert lines[0] == "# 12 images, 23040 pixels, 0 images that cannot be read"
    assert lines[1:4] == ["data:", "  in_channels: 5", "  value_range: [0, 65535]"]
    for line, expected in zip(lines[4:], (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))), strict=True):
        assert np.allclose([float(word) for word in line.partition("[")[2].rstrip("]").split(",")], expected, rtol=1e-5)
    assert script.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
