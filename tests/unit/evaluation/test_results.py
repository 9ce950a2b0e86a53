"""results.json: complete, valid JSON, and never half written."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2_equi.evaluation import results
from dinov2_equi.evaluation.results import folder_name, write_results, write_text_atomically


def test_every_field_of_the_schema_is_written(tmp_path: Path) -> None:
    path = write_results(
        tmp_path / "deep" / "results.json",
        {"top1": {10: 0.5}},
        task="knn",
        seed=3,
        config_text="a: 1",
        settings={"k": [10]},
    )
    document = json.loads(path.read_text())
    assert document["schema_version"] == results.SCHEMA_VERSION
    assert document["numbers"] == {"top1": {"10": 0.5}}
    assert (document["task"], document["seed"], document["settings"]) == ("knn", 3, {"k": [10]})
    assert document["config_sha256"] == hashlib.sha256(b"a: 1").hexdigest()
    assert set(document) >= {"created_utc", "commit", "commit_is_dirty"}


def test_arrays_paths_and_missing_numbers_become_valid_json(tmp_path: Path) -> None:
    numbers = {
        "torch": torch.tensor([1.0, float("nan")]), "scalar": np.float32(0.5), "ints": np.arange(2),
        "flag": np.bool_(True), "bad": float("inf"), "path": Path("a"), "none": None, "pair": (1, "x"),
    }  # fmt: skip
    text = write_results(tmp_path / "r.json", numbers, task="t").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["numbers"] == {
        "torch": [1.0, None], "scalar": 0.5, "ints": [0, 1], "flag": True,
        "bad": None, "path": "a", "none": None, "pair": [1, "x"],
    }  # fmt: skip


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"numbers\.a\[1\]"):
        write_results(tmp_path / "r.json", {"a": [1, object()]}, task="t")
    assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_outside_a_checkout_the_commit_is_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Installed inside another project's checkout: git answers, but does not track this package.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results._git_state() == (None, None)


def test_inside_a_checkout_the_commit_and_its_changes_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "results.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "m")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results._git_state() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "results.py").write_text("2")
    assert results._git_state() == (git("rev-parse", "HEAD"), True)


def test_without_git_nothing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._git_state() == (None, None)


def test_the_name_of_a_backbone_is_more_than_one_folder() -> None:
    assert folder_name("random:vit_small/14") == "random_vit_small_14"
    assert folder_name("../runs/mine (2)") == "runs_mine_(2)"
    assert folder_name("..") == "unnamed"
