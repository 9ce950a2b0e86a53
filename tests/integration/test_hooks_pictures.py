"""Pictures while training, and the pictures of the report."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., int]
SHORT = ("optim.epochs=1", "evaluation.probe=false", "logging.tensorboard=false")


def embedded_pictures(html: str) -> Sequence[Image.Image]:
    """Return every PNG that stands in the text of a page, decoded."""
    encoded = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", html)
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]
    for picture in pictures:
        picture.load()
    return pictures


def section(report: Path, name: str) -> str:
    """Return the part of the report with this id."""
    found = re.search(rf'<section id="{name}">.*?</section>', report.read_text(), flags=re.DOTALL)
    assert found is not None, name
    return found.group()


def test_pictures_while_training_do_not_open(tmp_path: Path, debug_run: Run) -> None:
    assert debug_run(tmp_path, *SHORT, "logging.pictures_every_steps=4", "logging.report=false") == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["reconstruction_00000004.png", "reconstruction_00000008.png"]
    arrays = [np.asarray(Image.open(path)) for path in pictures]
    for array in arrays:
        assert array.dtype == np.uint8 and array.shape[2] == 3 and min(array.shape[:2]) > 100
        assert array.std() > 10, "a blank picture"
    assert arrays[0].shape == arrays[1].shape
    assert not np.array_equal(arrays[0], arrays[1]), "the decoder has learned in between"


@pytest.mark.parametrize("period", [0, 11])
def test_pictures_nobody_asked_for_are_drawn(tmp_path: Path, debug_run: Run, period: int) -> None:
    overrides = ["logging.report=false", f"logging.pictures_every_steps={period}"]
    assert debug_run(tmp_path, *SHORT, *overrides) == 0
    assert not (tmp_path / "pictures").exists()


def test_pictures_of_a_control_run_are_missed(tmp_path: Path, debug_run: Run) -> None:
    # Nothing is reconstructed: the key must do nothing rather than fail.
    overrides = ["logging.pictures_every_steps=5", "equi.loss_weight=0"]
    assert debug_run(tmp_path, *SHORT, *overrides) == 0
    assert not (tmp_path / "pictures").exists()
    assert 'id="reconstruction"' not in (tmp_path / "report.html").read_text()


def test_a_run_that_draws_no_image_is_asked_for_pictures(tmp_path: Path, debug_run: Run) -> None:
    assert debug_run(tmp_path, *SHORT, "logging.pictures_every_steps=5", "equi.target=theta") == 0
    assert not (tmp_path / "pictures").exists()
    assert 'id="reconstruction"' not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "num_images"),
    [
        (["equi.target=view_1"], 1),
        (["equi.include_final=true", "equi.decoder.type=upconv", "equi.decoder.half_resolution=true"], 3),
        (["equi.source_2=teacher", "equi.decoder.patch_fraction=0.5", "equi.family=mixture"], 2),
    ],
    ids=["one image", "three at half resolution", "some patches"],
)
def test_pictures_of_another_decoder_or_target_do_not_open(
    tmp_path: Path, debug_run: Run, overrides: list[str], num_images: int
) -> None:
    assert debug_run(tmp_path, *SHORT, "logging.pictures_every_steps=10", *overrides) == 0
    (picture,) = (tmp_path / "pictures").iterdir()
    assert np.asarray(Image.open(picture)).std() > 10, "a blank picture"
    shown = embedded_pictures(section(tmp_path / "report.html", "reconstruction"))
    assert len(shown) == 5 * (2 + 2 * num_images)  # 5 images: 2 views, then targets and reconstructions


def test_the_report_lacks_a_picture(finished_run: Path) -> None:
    report = finished_run / "report.html"
    # 5 held-back images, each as 2 views, 2 targets and 2 reconstructions; then as itself and as the features of the
    # untrained and the trained network.
    assert len(embedded_pictures(section(report, "reconstruction"))) == 5 * 6
    assert len(embedded_pictures(section(report, "features"))) == 5 * 3
    for name in ("probes", "curves", "details"):
        assert section(report, name)


def test_the_report_needs_something_outside_itself(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text()
    outside = re.findall(r"""(?:src|href)=["']?(?!data:|\#)([^"'\s>]+)""", text)
    assert not [target for target in outside if "://" in target or target.endswith((".js", ".css", ".png"))]
    assert "@import" not in text and "url(http" not in text


def test_a_run_without_held_back_images_has_no_report(tmp_path: Path, debug_run: Run) -> None:
    overrides = ["data.holdout_fraction=0", "optim.epochs=1", "logging.pictures_every_steps=2"]
    assert debug_run(tmp_path, *overrides) == 0
    assert not (tmp_path / "pictures").exists()
    text = (tmp_path / "report.html").read_text()
    assert 'id="reconstruction"' not in text
    assert "<svg" in text, "the loss curves need no images"


def test_a_switched_off_report_is_written(tmp_path: Path, debug_run: Run) -> None:
    assert debug_run(tmp_path, *SHORT, "logging.report=false") == 0
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "tensorboard").exists()
    assert "r2_rotation" not in (tmp_path / "results.json").read_text()
