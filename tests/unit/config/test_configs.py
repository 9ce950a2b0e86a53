"""The files in configs/: they load with the real registries, state their purpose, and hold the published values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.config.derive import derive
from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import value_at
from dinov2_equi.equi.families import FAMILIES
from dinov2_equi.models.registry import ARCHS

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = [
    "debug_cpu",
    "photos_2cores",
    "quickstart",
    "vitl14_baseline",
    "vitl14_equi",
    "vitl16_short_equi",
    "vits16_equi_1gpu",
]


def load(name: str) -> Config:
    return load_config(
        CONFIGS / f"{name}.yaml",
        (),
        arch_widths={arch: entry.embed_dim for arch, entry in ARCHS.items()},
        arch_heads={arch: entry.num_heads for arch, entry in ARCHS.items()},
        families=FAMILIES,
    )


def changes(config: Config, base: Config) -> dict[str, Any]:
    keys = leaf_types()
    return {key: value_at(config, key) for key in keys if value_at(config, key) != value_at(base, key)}


def test_all_configs_are_listed_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    load(name)
    assert caplog.text == ""


@pytest.mark.parametrize("name", NAMES)
def test_config_opens_with_purpose_command_and_hardware(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "# Purpose   " in header
    assert "# Command   " in header
    assert "# Meant for " in header
    assert f"configs/{name}.yaml" in header


def test_short_recipe_is_dinov2s_defaults_plus_the_papers_branch() -> None:
    assert changes(load("vitl16_short_equi"), Config()) == {
        "student.block_chunks": 4,  # in the published file too
        "equi.family": "se2",
        "equi.loss_weight": 1.0,
        "equi.projection_dim": 2048,
        "equi.dim": 512,
    }


def test_short_recipe_on_32_gpus_is_the_papers_run() -> None:
    derived = derive(load("vitl16_short_equi"), world_size=32)
    assert (derived.effective_batch_size, derived.total_steps) == (2048, 125_000)


def test_long_recipe_is_dinov2s_but_for_the_released_feed_forward_layer(tables: dict[str, Any]) -> None:
    published = load_config(Path(__file__).parent / "dinov2_yamls" / "vitl14.yaml", (), **tables)
    assert changes(load("vitl14_baseline"), published) == {
        "train.dataset_path": "data/imagenet22k",
        "student.ffn_layer": "mlp",
    }


def test_long_recipe_and_its_baseline_differ_in_the_branch_alone() -> None:
    assert changes(load("vitl14_equi"), load("vitl14_baseline")) == {
        "equi.family": "se2",
        "equi.loss_weight": 1.0,
        "equi.projection_dim": 2048,
        "equi.dim": 512,
    }


def test_debug_config_takes_twenty_steps_on_the_cpu() -> None:
    config = load("debug_cpu")
    assert derive(config, world_size=1).total_steps == 20
    assert config.train.device == "cpu"


@pytest.mark.parametrize("name", ["quickstart", "debug_cpu"])
def test_first_runs_need_no_download_and_no_gpu(name: str) -> None:
    config = load(name)
    assert config.train.dataset_path.partition(":")[0] in ("sample_photos", "synthetic")
    assert config.train.device in ("auto", "cpu")
