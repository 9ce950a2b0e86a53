"""The files in configs/: they load with the real registries, state their purpose, and hold the published values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2_equi.config.derive import derive
from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import value_at
from dinov2_equi.equi.families.registry import FAMILIES
from dinov2_equi.models.registry import ARCHS

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = [
    "debug_cpu",
    "photos_1gpu",
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
        archs=ARCHS,
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


# ------------------------------------------------------------------------------------------------------- controls

CONTROLS: dict[str, dict[str, Any]] = {
    "baseline": {"equi.family": None, "equi.loss_weight": 0.0, "equi.split_without_transform": True},
    "masked": {
        "ibot.mask_sample_probability": 0.5,
        "equi.target": "masked",
        "equi.include_final": False,
        "equi.only_unmasked": False,
    },
    "steps_1": {"equi.target": "path", "equi.num_steps": 1},
    "steps_2": {"equi.target": "path", "equi.num_steps": 2},
    "steps_3": {"equi.target": "path", "equi.num_steps": 3},
    "theta": {"equi.target": "theta", "equi.include_final": False},
    "transform_only": {"equi.loss_weight": 0.0},
    "untransformed": {"equi.target": "untransformed", "equi.include_final": False},
    "view_1": {"equi.target": "view_1", "equi.include_final": False},
    "view_2": {"equi.target": "view_2", "equi.include_final": False},
}
"""What each file in configs/controls sets: with nothing else in it, rows of a table differ in one thing."""

BASES = ["debug_cpu", "photos_2cores", "quickstart", "vitl14_equi", "vitl16_short_equi", "vits16_equi_1gpu"]
"""Configurations with the branch, after which a control may stand."""


def load_control(base: str, control: str, *overrides: str) -> Config:
    files = [CONFIGS / f"{base}.yaml", CONFIGS / "controls" / f"{control}.yaml"]
    return load_config(files, overrides, archs=ARCHS, families=FAMILIES)


def test_all_controls_are_listed_here() -> None:
    assert sorted(path.stem for path in (CONFIGS / "controls").glob("*.yaml")) == sorted(CONTROLS)


@pytest.mark.parametrize("name", CONTROLS)
def test_control_sets_what_it_is_named_after_and_nothing_else(name: str) -> None:
    sections = yaml.safe_load((CONFIGS / "controls" / f"{name}.yaml").read_text())
    keys = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    assert keys == CONTROLS[name]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CONTROLS)
def test_control_after_a_configuration_changes_its_own_keys_alone(
    name: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_control(base, name)
    assert {key: value_at(config, key) for key in CONTROLS[name]} == CONTROLS[name]
    assert changes(config, load(base)).keys() <= CONTROLS[name].keys()
    assert caplog.text == ""


@pytest.mark.parametrize(
    "name", sorted(set(CONTROLS) - {"steps_1", "steps_2", "steps_3", "transform_only", "baseline"})
)
def test_control_stands_after_a_configuration_whose_options_fit_the_path_alone(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("equi: {family: se2, loss_weight: 1.0, include_final: true, only_unmasked: true}")
    files = [base, CONFIGS / "controls" / f"{name}.yaml"]
    assert not load_config(files, (), archs=ARCHS, families=FAMILIES).equi.include_final


@pytest.mark.parametrize("name", CONTROLS)
def test_control_opens_with_purpose_command_and_what_it_tells(name: str) -> None:
    text = (CONFIGS / "controls" / f"{name}.yaml").read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "# Purpose   " in header
    assert "# Command   " in header
    assert "# It tells  " in header
    assert f"configs/controls/{name}.yaml" in header
