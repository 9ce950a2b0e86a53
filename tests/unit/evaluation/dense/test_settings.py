"""Settings from files and words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dinov2_equi.evaluation.dense.settings import read_settings


@dataclass(frozen=True)
class Recipe:
    steps: int = 10
    lr: float = 0.1
    head: str = "linear"
    flip: bool = True
    scales: tuple[float, ...] = (0.5, 2.0)


def test_words_do_not_win_over_the_file_or_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("steps: 20\nlr: 1e-3\nscales: [1, 1.5]\n")
    assert read_settings(Recipe, path, ["steps=30", "flip=false"]) == Recipe(30, 1e-3, "linear", False, (1.0, 1.5))
    assert read_settings(Recipe, None, []) == Recipe()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("step=3", "did you mean steps"),
        ("steps", "expected NAME=VALUE"),
        ("steps=2.5", "expected steps to be like 10"),
        ("steps=true", "expected steps to be like 10"),
        ("lr=fast", "expected lr to be like 0.1"),
        ("flip=1", "expected flip to be like True"),
        ("head=3", "expected head to be like 'linear'"),
        ("scales=[]", "a list like"),
    ],
)
def test_wrong_setting_is_taken(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(Recipe, None, [word])


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", ""])
def test_file_that_holds_no_settings_is_taken(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_settings(Recipe, path, [])
