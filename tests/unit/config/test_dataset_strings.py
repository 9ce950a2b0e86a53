"""Strings that name data sets arrive whole from a command line and from YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dinov2_equi.config.schema import Config

SPECS = (
    "mix:3*/data/a b + 1*ImageNet:split=TRAIN:root=/data/imagenet",
    "/data/train-{000000..000146}.tar",
    "/data/**/*.jpg",
    "table:path=/data/t.csv:column=file:label=kind",
)


@pytest.mark.parametrize("spec", SPECS)
def test_data_set_string_is_changed_on_its_way(make_config: Callable[..., Config], tmp_path: Path, spec: str) -> None:
    assert make_config(f"train.dataset_path={spec}").train.dataset_path == spec
    file = tmp_path / "c.yaml"
    file.write_text(f"train:\n  dataset_path: {spec}\n")
    assert make_config(config_file=file).train.dataset_path == spec
