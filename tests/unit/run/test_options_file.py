"""Options from a YAML file beside those of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinov2_equi.run.options_file import OptionsFileParser


def parser() -> OptionsFileParser:
    made = OptionsFileParser("What it does.")
    made.add_argument("--weights", nargs="+", required=True)
    made.add_argument("--test-pairs", type=int, default=7)
    made.add_argument("--image-size", type=int, nargs=2, default=[1, 2])
    made.add_argument("--lr", type=float, default=0.5)
    made.add_argument("--kind", choices=("a", "b"), default="a")
    return made


def test_a_file_is_not_read_or_decides_over_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("test_pairs: 9\nimage_size: [240, 320]\nlr: 1.0e-3\nkind: b\n")
    read = parser().parse_args(["--weights", "x", "y", "--config", str(path), "--test-pairs", "3"])
    assert (read.weights, read.test_pairs, read.image_size, read.lr, read.kind) == (
        ["x", "y"],
        3,
        [240, 320],
        1e-3,
        "b",
    )
    assert read.config == path
    assert parser().parse_args(["--weights", "x"]).test_pairs == 7


def test_a_required_option_may_not_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("weights: [x, y]\n")
    assert parser().parse_args([f"--config={path}"]).weights == ["x", "y"]


def test_a_shortened_option_is_taken_and_its_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--weights", "x", "--conf", str(tmp_path / "options.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test_pair_s: 9\n", "unrecognized arguments: --test-pair-s 9"),
        ("test_pairs: many\n", "argument --test-pairs: invalid int value: 'many'"),
        ("kind: c\n", "argument --kind: invalid choice: 'c'"),
        ("lr: true\n", "expected lr in .* to be a number, a text or a list of them, got True"),
        ("lr:\n", "expected lr in .* got None"),
        ("gpus_per_node: 8\n", "gpus_per_node in .* says how a job starts: give it on the command line"),
        ("config: other.yaml\n", "config in .* is no option for a file"),
        ("- 1\n", "to hold NAME: VALUE lines, got list"),
        ("a: [\n", "is no valid YAML"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_ends_in_a_traceback_or_without_a_reason(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--weights", "x", "--config", str(path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: .*{message}", error), error
