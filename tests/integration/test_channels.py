"""Training on images that are no photographs, and what can be done with such a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.logging.metrics import read_metrics
from dinov2_equi.run.export import main as export
from dinov2_equi.run.extract import main as extract
from dinov2_equi.run.load import load_run
from dinov2_equi.run.visualize import main as visualize

Run = Callable[..., int]
REPOSITORY = Path(__file__).resolve().parents[2]
RUN, FILE, FOLDER, PAIRS = "RUN", "FILE", "FOLDER", "PAIRS"
FIVE = ("data.in_channels=5", "data.mean=[0.5,0.5,0.5,0.5,0.5]", "data.std=[0.3,0.3,0.3,0.3,0.3]")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve npy files of five channels in two classes, 16 bits."""
    folder = tmp_path_factory.mktemp("arrays")
    for number in range(12):
        (folder / f"class{number % 2}").mkdir(exist_ok=True)
        values = np.random.default_rng(number).integers(0, 2 ** (16 - number % 2), (5, 40, 48), np.uint16)
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


@pytest.fixture(scope="module")
def photo_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs with the classes of their pixels."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, mode in (("images", "RGB"), ("annotations", "L")):
        (folder / name).mkdir()
        for number in range(2):
            Image.new(mode, (32, 32)).save(folder / name / f"{number}.png")
    (folder / "classes.txt").write_text("dark\nbright\n")
    return folder


@pytest.fixture
def eval_script(load_script: Callable[[Path], ModuleType]) -> Callable[..., int]:
    """Return what runs a script of eval/ by its path and words."""
    return lambda path, *words: int(load_script(REPOSITORY / "eval" / path).main([str(word) for word in words]))


HARNESSES = {
    "classification/run.py": ("--tasks", "knn", "retrieval", "--k", 1, "--size", 32),
    "equivariance/run.py": ("--size", 32, "--epochs", 1, "--draws", 1, "--families", "rotation", "--seeds", 0),
    "homography/run.py": ("--patch", 16, "--max-shift", 4, "--image-size", 40, 48, "--steps", 1, "--test-pairs", 2),
}


@pytest.mark.parametrize("script", HARNESSES)
def test_harnesses_read_the_images_as_the_run_does(
    run: Path, arrays: Path, eval_script: Callable[..., int], tmp_path: Path, script: str
) -> None:
    test = "--val" if script.startswith("classification") else "--test"
    words = ("--weights", run, "random", "pixels", "--train", arrays, test, arrays, *HARNESSES[script])
    cache = ("--cache", tmp_path / "cache") if script.startswith("classification") else ()
    assert eval_script(script, *words, *cache, "--output", tmp_path / "out") == 0
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["numbers"]
    assert set(numbers) == {"five", "five before training", "pixels"}


def test_knn_and_dense_equivariance_and_features_and_looks_of_five_channels(
    run: Path, arrays: Path, eval_script: Callable[..., int], tmp_path: Path
) -> None:
    sets = ("--train", arrays, "--val", arrays, "--size", 32, "--k", 1, "--features", "patch_mean")
    assert eval_script("classification/knn.py", "--run", run, *sets, "--output", tmp_path / "knn.json") == 0
    # Each image is among the training images, and those of the other class are half as bright.
    assert json.loads((tmp_path / "knn.json").read_text())["numbers"]["top1"] == {"1": 1.0}
    few = ("--data", arrays, "--images", 2, "--size", 32)
    assert eval_script("homography/dense_equivariance.py", "--weights", run, *few, "--output", tmp_path / "dense") == 0
    assert (
        extract(
            [
                str(arrays),
                "--weights",
                str(run),
                "--size",
                "32",
                "--features",
                "patch_mean",
                "--out",
                str(tmp_path / "f.npy"),
            ]
        )
        == 0
    )
    images = np.stack([np.load(file) for file in sorted(arrays.rglob("*.npy"))]) / 65535
    cut = torch.stack([EvalTransform(32)(torch.from_numpy(image).float()) for image in images])
    expected = load_run(run).features(cut, device="cpu")["patch_mean"]
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "f.npy")), expected, atol=1e-5, rtol=0)  # rounding
    photo = str(next(arrays.rglob("*.npy")))
    assert visualize([photo, "--weights", str(run), "--size", "32", "--output", str(tmp_path / "looks")]) == 0
    assert (tmp_path / "looks" / "index.html").is_file()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("segmentation/run.py", ("--data", PAIRS), "this measurement has photographs of red, green and blue alone"),
        ("classification/finetune.py", ("--train", FOLDER, "--val", FOLDER), "has photographs of red, green and blue"),
        ("classification/run.py", ("--weights", RUN, "random:vit_test_tiny/8"), "random:vit_test_tiny/8 photographs)"),
        ("classification/run.py", ("--weights", FILE), "weights alone do not say their mean, deviation and range"),
        (
            "homography/dense_equivariance.py",
            ("--data", FOLDER, "--families", "color"),
            "images of 5 channels show no color: leave it out of --families",
        ),
        ("equivariance/run.py", (), "small_photos:split=TRAIN holds photographs of red, green and blue alone"),
    ],
)
def test_what_cannot_be_measured_of_five_channels_is_said_in_one_line(
    run: Path,
    arrays: Path,
    photo_pairs: Path,
    eval_script: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    words: tuple[object, ...],
    message: str,
) -> None:
    places = {RUN: run, FILE: run / "teacher_backbone.safetensors", FOLDER: arrays, PAIRS: photo_pairs}
    weights = () if "--weights" in words else ("--weights", run)
    needed = ("--train", arrays, "--val", arrays) if script == "classification/run.py" else ()
    found = [places.get(word, word) for word in words]
    assert eval_script(script, *weights, *needed, *found, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_the_teacher_is_measured_while_it_trains_on_five_channels(tmp_path: Path, arrays: Path, lean_run: Run) -> None:
    keys = ("evaluation.tasks=[knn,linear,equivariance]", "evaluation.eval_period_iterations=1")
    small = ("train.OFFICIAL_EPOCH_LENGTH=1", "data.holdout_fraction=0.25", "evaluation.probe_epochs=1")
    assert lean_run(tmp_path / "run", f"train.dataset_path={arrays}", *FIVE, *keys, *small) == 0
    lines = read_metrics(tmp_path / "run" / "evaluation_metrics.json")
    assert lines and {"eval/knn", "eval/linear", "eval/r2_rotation"} <= set(lines[-1])


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
