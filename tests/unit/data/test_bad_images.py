"""Bad images are listed once, and too many of them stop the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dinov2_equi.data.bad_images import BadImage, BadImageLog, TooManyBadImagesError, check_shape
from dinov2_equi.data.datasets.base import UnreadableImageError


def bad(*numbers: int) -> list[BadImage]:
    return [BadImage(number, f"photos/{number}.jpg", "cut off") for number in numbers]


def listed(folder: Path) -> list[int]:
    return [json.loads(line)["index"] for line in (folder / "bad_images.jsonl").read_text().splitlines()]


def test_each_bad_image_is_listed_once_with_path_and_reason(tmp_path: Path) -> None:
    log = BadImageLog(tmp_path, 0.5)
    for numbers in ((3, 5, 3), (5,), (), (7,)):
        log.record(4, bad(*numbers))
    assert listed(tmp_path) == [3, 5, 7]
    line = json.loads((tmp_path / "bad_images.jsonl").read_text().splitlines()[0])
    assert line == {"index": 3, "path": "photos/3.jpg", "reason": "cut off"}


def test_no_file_without_a_bad_image(tmp_path: Path) -> None:
    BadImageLog(tmp_path, 0.0).record(64, [])
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_lists_no_image_twice_and_drops_half_a_line(tmp_path: Path) -> None:
    BadImageLog(tmp_path, 0.5).record(4, bad(3, 5))
    with (tmp_path / "bad_images.jsonl").open("a") as file:
        file.write('{"index": 7, "pa')
    BadImageLog(tmp_path, 0.5).record(4, bad(5, 7))
    assert listed(tmp_path) == [3, 5, 7]


def test_training_stops_above_the_allowed_share_and_says_where_the_list_is(tmp_path: Path) -> None:
    log = BadImageLog(tmp_path, 0.1)
    for number in range(100):
        log.record(0, bad(number))  # a tenth of the 1,000 images that count at least
    with pytest.raises(TooManyBadImagesError, match=r"101 of the 101 images.*max_bad_fraction=0\.1.*bad_images\.jsonl"):
        log.record(0, bad(100))
    assert len(listed(tmp_path)) == 101


def test_the_share_is_of_all_images_that_were_read(tmp_path: Path) -> None:
    log = BadImageLog(tmp_path, 0.1)
    for number in range(300):
        log.record(9, bad(number))  # one in ten, for 3,000 images
    with pytest.raises(TooManyBadImagesError, match="301 of the 3001 images"):
        log.record(0, bad(300))


def test_share_0_stops_at_the_first_bad_image_and_share_1_never(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadImagesError, match=r"photos/0\.jpg: cut off"):
        BadImageLog(tmp_path, 0.0).record(1000, bad(0))
    log = BadImageLog(tmp_path, 1.0)
    for number in range(2000):
        log.record(0, bad(number % 10))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 30), (1, 10_000), (10_000, 1), (8, 161), (10, 10_000)])
def test_images_that_show_nothing_are_refused(height: int, width: int) -> None:
    with pytest.raises(UnreadableImageError, match=rf"x\.png: {width} x {height} pixels; expected"):
        check_shape(torch.zeros(3, height, width, dtype=torch.uint8), "x.png")


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 160), (25, 25), (400, 40)])
def test_small_and_long_images_within_the_limits_are_used(height: int, width: int) -> None:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert check_shape(image, "x.png") is image
