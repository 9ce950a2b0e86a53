"""The metrics file across kills and resumes."""

from __future__ import annotations

import builtins
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.logging.metrics import METRICS_NAME, MetricWriter, read_metrics


def write_steps(directory: Path, steps: range, start_step: int = 0) -> None:
    with MetricWriter(directory, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, {"total_loss": step + 0.5})


def written_steps(directory: Path) -> list[float]:
    return [line["iteration"] for line in read_metrics(directory / METRICS_NAME)]


def test_each_line_is_one_json_object(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"total_loss": torch.tensor(0.25), "lr": 1e-3, "batch": 32})
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"iteration": 3, "total_loss": 0.25, "lr": 0.001, "batch": 32.0}]


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.write(0, {"total_loss": 1.0})
    assert written_steps(tmp_path) == [0]
    writer.close()


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"x": value})
    with MetricWriter(tmp_path, start_step=1):
        pass
    assert read_metrics(tmp_path / METRICS_NAME)[0]["x"] == value


def test_non_finite_values_stay_valid_json(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"nan": math.nan, "inf": -math.inf})
    assert json.loads((tmp_path / METRICS_NAME).read_text()) == {"iteration": 0, "nan": None, "inf": None}
    line = read_metrics(tmp_path / METRICS_NAME)[0]
    assert math.isnan(line["nan"])
    assert math.isnan(line["inf"])


def test_resume_holds_no_step_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, range(10))
    write_steps(tmp_path, range(6, 12), start_step=6)
    assert written_steps(tmp_path) == list(range(12))


def test_restart_from_zero_holds_no_step_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, range(10))
    write_steps(tmp_path, range(3))
    assert written_steps(tmp_path) == [0, 1, 2]


def test_resume_beyond_the_last_line_keeps_all(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(7, 8), start_step=7)
    assert written_steps(tmp_path) == [0, 1, 2, 7]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(3))
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert written_steps(tmp_path) == [0, 1]
    write_steps(tmp_path, range(2, 4), start_step=2)
    assert written_steps(tmp_path) == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    path = tmp_path / METRICS_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", lines[2], ""]))
    with pytest.raises(ValueError, match=r"line 2 of .*training_metrics.json is not JSON"):
        read_metrics(path)


@pytest.mark.parametrize("line", ["[1]", '{"total_loss": 1.0}', '{"iteration": "1"}'])
def test_a_line_without_a_step_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_NAME).write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1 of .* has no 'iteration'"):
        read_metrics(tmp_path / METRICS_NAME)


def test_a_file_that_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text("valuable\n")
    with pytest.raises(ValueError, match="line 1"):
        MetricWriter(tmp_path)
    assert (tmp_path / METRICS_NAME).read_text() == "valuable\n"


def test_a_kill_during_truncation_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(4))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricWriter(tmp_path, start_step=2)
    assert written_steps(tmp_path) == [0, 1, 2, 3]
    write_steps(tmp_path, range(2, 3), start_step=2)
    assert written_steps(tmp_path) == [0, 1, 2]


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).touch()
    assert read_metrics(tmp_path / METRICS_NAME) == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "absent.json")


def test_picture_is_written_as_it_is(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    with MetricWriter(tmp_path) as writer:
        path = writer.write_image(12, "views/first", image)
    assert path == tmp_path / "pictures" / "views_first_00000012.png"
    assert np.array_equal(np.asarray(Image.open(path)), image)


@pytest.mark.parametrize("image", [np.zeros((4, 6)), np.zeros((4, 6, 3)), np.zeros((3, 4, 6), np.uint8)])
def test_picture_of_another_layout_is_refused(tmp_path: Path, image: Any) -> None:
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"\[H, W, 3\] of uint8"):
        writer.write_image(0, "views", image)


def test_tensorboard_gets_the_scalars_and_hides_repeated_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, stop in ((0, 5), (3, 6)):
        with MetricWriter(tmp_path, tensorboard=True, start_step=start) as writer:
            for step in range(start, stop):
                writer.write(step, {"loss": float(start + step)})
            writer.write_image(start, "views", np.zeros((4, 6, 3), np.uint8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 6.0), (4, 7.0), (5, 8.0)
    ]  # fmt: skip
    assert [event.step for event in events.Images("views")] == [0, 3]


def test_without_tensorboard_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_import = builtins.__import__

    def no_tensorboard(name: str, *arguments: Any, **keywords: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError("No module named 'tensorboard'")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_tensorboard)
    with caplog.at_level(logging.INFO), MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.write(0, {"loss": 1.0})
    assert written_steps(tmp_path) == [0]
    assert "TensorBoard is not installed" in caplog.text


def test_close_twice_is_fine(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.close()
    writer.close()
