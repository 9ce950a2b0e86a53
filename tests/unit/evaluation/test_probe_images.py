"""Images in memory: values, number, labels, colour."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.evaluation.probe_images import ProbeImages, as_float, load_probe_images


def write(root: Path, classes: tuple[str, ...], count: int, *, grey: bool = False) -> Path:
    rng = np.random.default_rng(len(classes) * 100 + count)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels[..., :1].repeat(3, axis=2) if grey else pixels).save(root / name / f"{index}.png")
    return root


def load(train: Path, test: Path, max_train: int = 100, max_test: int = 100) -> ProbeImages:
    datasets = make_dataset(str(train)), make_dataset(str(test))
    return load_probe_images(*datasets, size=16, max_train=max_train, max_test=max_test, batch_size=2)


def test_images_differ_from_those_of_the_other_harnesses(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a", ("x", "y"), 4), write(tmp_path / "b", ("x", "y"), 2)
    images = load(train, test, max_train=5)
    assert images.train.dtype == torch.uint8
    assert torch.equal(as_float(images.train), eval_images(make_dataset(str(train)), 16, 5))
    assert torch.equal(as_float(images.test), eval_images(make_dataset(str(test)), 16, 100))
    assert torch.equal(as_float(as_float(images.test)), as_float(images.test))


def test_labels_do_not_follow_the_images_that_were_taken(tmp_path: Path) -> None:
    images = load(write(tmp_path / "a", ("x", "y", "z"), 4), write(tmp_path / "b", ("y", "z"), 2), max_train=6)
    assert images.labels is not None
    assert images.labels[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert images.labels[1].tolist() == [1, 1, 2, 2]


def test_classes_that_do_not_match_stop_the_measurement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        images = load(write(tmp_path / "a", ("x", "y"), 2), write(tmp_path / "b", ("x", "other"), 2))
    assert images.labels is None
    assert "no k-NN" in caplog.text and "other" in caplog.text


def test_images_without_classes_get_labels(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a", ("x",), 2), write(tmp_path / "b", ("x", "y"), 2)).labels is None


@pytest.mark.parametrize("grey", [True, False])
def test_grey_and_colour_are_mixed_up(tmp_path: Path, grey: bool) -> None:
    assert load(write(tmp_path / "a", ("x",), 2, grey=grey), write(tmp_path / "b", ("x",), 2)).is_grey == grey
