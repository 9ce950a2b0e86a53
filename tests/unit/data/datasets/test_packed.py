"""Strings in two arrays."""

from __future__ import annotations

import os

import numpy as np

from dinov2_equi.data.datasets.packed import PackedStrings


def test_strings_come_back_whole() -> None:
    strings = ["", "a", "photos/é.png", "x" * 5000, "", os.fsdecode(b"not \xff utf-8"), "日本"]
    packed = PackedStrings.of(iter(strings))
    assert len(packed) == 7 and [packed[index] for index in range(7)] == strings
    assert len(PackedStrings.of([])) == 0


def test_one_long_string_does_not_make_all_long() -> None:
    packed = PackedStrings.of(["x" * 4000, *(f"{number:06d}" for number in range(100_000))])
    assert packed.text.nbytes + packed.ends.nbytes == 4000 + 6 * 100_000 + 8 * 100_001
    assert packed.ends.dtype == np.int64 and packed[99_999] == "099998"
