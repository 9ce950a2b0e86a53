"""Words of a command line: which are files, which are overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_equi.train.settings import split_words


def test_files_and_overrides_keep_their_order() -> None:
    files, overrides = split_words(["a=1", "x.yaml", "b.c=2", "folder/y.yml", "a=3"])
    assert files == [Path("x.yaml"), Path("folder/y.yml")]
    assert overrides == ["a=1", "b.c=2", "a=3"]


def test_value_that_names_a_yaml_file_is_no_file() -> None:
    assert split_words(["train.dataset_path=list.yaml"]) == ([], ["train.dataset_path=list.yaml"])


def test_existing_file_in_a_folder_with_an_equals_sign_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    Path("lr=1/config.yaml").touch()
    assert split_words(["lr=1/config.yaml"]) == ([Path("lr=1/config.yaml")], [])


def test_anything_else_is_left_to_the_configuration_to_refuse() -> None:
    assert split_words(["nonsense", ""]) == ([], ["nonsense", ""])
