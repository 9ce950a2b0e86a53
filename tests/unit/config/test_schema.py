"""The schema against DINOv2's keys, defaults and published training files."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2_equi.config import schema
from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import value_at

PUBLISHED = Path(__file__).parent / "dinov2_yamls"


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        leaves.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return leaves


def read_published(name: str) -> dict[str, Any]:
    return flatten(yaml.safe_load((PUBLISHED / name).read_text()))


def test_all_88_keys_of_dinov2_exist_with_its_defaults() -> None:
    defaults = read_published("ssl_default_config.yaml")
    assert len(defaults) == 88
    assert {key: value_at(Config(), key) for key in defaults} == defaults


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLISHED.glob("*.yaml")))
def test_published_training_file_loads_unchanged(
    name: str, tables: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(PUBLISHED / name, (), **tables)
    expected = read_published("ssl_default_config.yaml") | read_published(name)
    assert {key: value_at(config, key) for key in expected} == expected
    assert config.equi.family is None  # what DINOv2 does not know stays off
    assert config.equi.loss_weight == 0
    assert caplog.text == ""  # nothing in these files is without effect here


def test_published_files_are_all_there() -> None:
    names = {path.stem for path in PUBLISHED.glob("*.yaml")}
    assert names == {"ssl_default_config", "vitl14", "vitg14", "vitl16_short"}


def test_defaults_are_not_shared_between_two_configs() -> None:
    first, second = Config(), Config()
    first.crops.global_crops_scale[0] = 0.9
    first.compute_precision.student.backbone.mixed_precision.param_dtype = "fp32"
    assert second.crops.global_crops_scale == [0.32, 1.0]
    assert second.compute_precision.student.backbone.mixed_precision.param_dtype == "fp16"
    assert second.compute_precision.teacher.backbone.mixed_precision.param_dtype == "fp16"


def test_every_leaf_is_explained_under_its_field() -> None:
    unexplained = []
    for owner in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        for field, following in zip(owner.body, [*owner.body[1:], None], strict=True):
            is_leaf = isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config")
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if is_leaf and not is_text:
                unexplained.append(f"{owner.name}.{ast.unparse(field)}")
    assert unexplained == []


def test_types_of_the_leaves_are_few_and_plain() -> None:
    names = {
        getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint) for hint in leaf_types().values()
    }
    assert names <= {"bool", "int", "float", "str", "list[float]", "list[str]", "int | None", "str | None"}
