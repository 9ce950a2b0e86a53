"""The rules: each value at and beyond its limits, and values that do not fit each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dinov2_equi.config.errors import ConfigError
from dinov2_equi.config.keys import is_text, leaf_types
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import CHOICES, RULES, find_problems, validate, value_at

PATHS = {
    "MODEL.WEIGHTS",
    "train.output_dir",
    "student.pretrained_weights",
    "data.holdout_path",
    "evaluation.train_dataset_path",
    "evaluation.val_dataset_path",
}
FROM_TABLES = {"student.arch", "equi.family"}
JUDGED_WITH_OTHERS = {"equi.layer", "equi.mixture"}  # what they may be depends on the architecture and the family


def with_values(**values: Any) -> Config:
    """Return the defaults with some leaves replaced; `__` stands for the dot."""
    config = Config()
    for name, value in values.items():
        *sections, leaf = name.split("__")
        owner: Any = config
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, leaf, value)
    return config


def keys_at_fault(config: Config, tables: dict[str, Any]) -> list[str]:
    return [problem.key for problem in find_problems(config, **tables)]


def test_defaults_are_valid(tables: dict[str, Any]) -> None:
    validate(Config(), **tables)


def test_every_leaf_has_a_rule_or_is_free_by_intention() -> None:
    free = {key for key, hint in leaf_types().items() if hint is bool} | PATHS | FROM_TABLES | JUDGED_WITH_OTHERS
    assert set(leaf_types()) - set(RULES) - set(CHOICES) - free == set()


def test_every_rule_belongs_to_a_leaf() -> None:
    assert (set(RULES) | set(CHOICES)) <= set(leaf_types())
    assert all(is_text(leaf_types()[key]) for key in CHOICES)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("train__batch_size_per_gpu", [1], [0, -1]),
        ("train__num_workers", [0], [-1]),
        ("train__seed", [0, 2**32 - 1], [-1, 2**32]),
        ("train__dataset_path", ["x"], ["", "  "]),
        ("student__drop_path_rate", [0.0, 0.999], [-0.1, 1.0]),
        ("ibot__mask_sample_probability", [0.0, 1.0], [-0.01, 1.01]),
        (
            "ibot__mask_ratio_min_max",
            [[0.0, 0.0], [0.5, 0.5], [0, 1]],
            [[0.5, 0.1], [0.1], [0.1, 0.2, 0.3], [0, 1.1], []],
        ),
        ("crops__global_crops_scale", [[0.1, 1.0], [1, 1]], [[0.0, 1.0], [0.5, 0.4], [0.5, 1.1], [0.5]]),
        ("crops__local_crops_number", [0, 1], [-1]),
        ("teacher__momentum_teacher", [0.0, 1.0], [-0.1, 1.1]),
        ("teacher__teacher_temp", [0.001], [0.0, -1.0]),
        ("optim__layerwise_decay", [1.0, 0.01], [0.0, 1.01]),
        ("optim__adamw_beta2", [0.0, 0.999], [1.0, -0.1]),
        ("optim__clip_grad", [0.0], [-1.0]),
        ("equi__num_steps", [1], [0]),
        ("equi__max_rotation_deg", [0.0, 180.0], [-1.0, 181.0]),
        ("equi__max_translation_px", [0.0, 112.0], [-1.0, 113.0]),
        ("equi__max_brightness", [0.0, 1.0], [-0.1, 1.1]),
        ("equi__max_contrast", [0.0, 1.0], [-0.1, 1.1]),
        ("equi__max_saturation", [0.0, 1.0], [-0.1, 1.1]),
        ("equi__max_hue", [0.0, 0.5], [-0.1, 0.6]),
        (
            "equi__blur_sigma_px",
            [[0.0, 0.0], [0.1, 16.0], [2, 2]],
            [[2.0, 1.0], [-1.0, 1.0], [1.0, 17.0], [1.0], [1.0, 1.0, 1.0], []],
        ),
        ("equi__max_zoom", [1.001, 4.0], [1.0, 0.5, 4.1]),
        ("equi__max_corner_px", [0.0, 55.0], [-1.0, 56.0]),  # at 56 three corners can come to lie on a line
        ("equi__decoder__depth", [1], [0]),
        ("equi__decoder__patch_fraction", [0.001, 1.0], [0.0, 1.1]),
        ("logging__diagnostics_every_steps", [0, 1], [-1]),
        ("data__holdout_fraction", [0.0, 0.99], [-0.1, 1.0]),
        ("data__mean", [[0.0, 0.0, 0.0]], [[0.5], [0.5] * 4, []]),
        ("data__std", [[0.1, 0.1, 0.1]], [[0.1, 0.0, 0.1], [0.1, 0.1], []]),
        ("logging__metrics_every_steps", [1], [0]),
        ("evaluation__eval_period_iterations", [0], [-1]),
        ("evaluation__tasks", [[], ["linear"], ["equivariance", "knn"]], [["depth"], ["knn", ""]]),
        ("evaluation__max_images", [1], [0]),
    ],
)
def test_limits(key: str, good: list[Any], bad: list[Any], tables: dict[str, Any]) -> None:
    dotted = key.replace("__", ".")
    assert [value for value in good if dotted in keys_at_fault(with_values(**{key: value}), tables)] == []
    assert [value for value in bad if keys_at_fault(with_values(**{key: value}), tables) != [dotted]] == []


@pytest.mark.parametrize("key", [key for key, hint in leaf_types().items() if hint in (int, float, int | None)])
def test_no_number_may_be_negative_or_nan(key: str, tables: dict[str, Any]) -> None:
    for value in (-1, float("nan")):
        config = with_values(**{key.replace(".", "__"): value})
        assert keys_at_fault(config, tables) == [key]


@pytest.mark.parametrize(
    ("key", "word", "meant"),
    [
        ("student__arch", "vit_smal", "vit_small"),
        ("equi__family", "SE2", "se2"),
        ("train__centering", "sinkhorn", "sinkhorn_knopp"),
        ("student__ffn_layer", "swiglu_fused", "swiglufused"),
        ("crops__blur", "intendet", "intended"),
        ("equi__fill", "zero", "zeros"),
        ("equi__target", "mask", "masked"),
        ("equi__source_2", "teachers", "teacher"),
        ("equi__decoder__type", "up_conv", "upconv"),
        ("train__device", "gpu", None),
        ("compute_precision__autocast", "fp16", "bf16"),
        ("optim__scaling_rule", "linear", None),
    ],
)
def test_unknown_word_lists_the_known_and_the_nearest(
    key: str, word: str, meant: str | None, tables: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_values(**{key: word}), **tables)
    message = str(caught.value)
    assert message.startswith(f"{key.replace('__', '.')} must be one of ")
    assert f"got {word!r}" in message
    if meant is not None:
        assert f"did you mean {meant!r}?" in message


def test_choices_hold_their_own_defaults() -> None:
    assert {key: value_at(Config(), key) for key in CHOICES if value_at(Config(), key) not in CHOICES[key]} == {}


@pytest.mark.parametrize(
    ("values", "key", "parts"),
    [
        ({"crops__global_crops_size": 225}, "crops.global_crops_size", ["student.patch_size 16", "225", "224 or 240"]),
        ({"crops__local_crops_size": 100}, "crops.local_crops_size", ["student.patch_size 16", "100", "96 or 112"]),
        ({"crops__local_crops_size": 7}, "crops.local_crops_size", ["student.patch_size 16", "7", "set 16"]),
        ({"evaluation__probe_size": 33}, "evaluation.probe_size", ["student.patch_size 16", "33", "32 or 48"]),
        ({"optim__warmup_epochs": 101}, "optim.warmup_epochs", ["optim.epochs 100", "101"]),
        ({"optim__freeze_last_layer_epochs": 101}, "optim.freeze_last_layer_epochs", ["optim.epochs 100", "101"]),
        ({"optim__min_lr": 0.1}, "optim.min_lr", ["optim.base_lr 0.004", "0.1"]),
        ({"equi__loss_weight": 1.0}, "equi.loss_weight", ["equi.family", "1.0"]),
        ({"equi__family": "se2", "equi__dim": 1024}, "equi.dim", ["student.arch 'vit_large'", "1024"]),
        (
            {"equi__family": "se2", "equi__dim": 512, "equi__projection_dim": 512},
            "equi.dim",
            ["equi.projection_dim 512"],
        ),
        ({"equi__family": "se2", "equi__projection_dim": 3}, "equi.dim", ["equi.projection_dim 3"]),
        ({"equi__family": "se2", "equi__decoder__num_heads": 4}, "equi.decoder.num_heads", ["equi.decoder.width"]),
        (
            {"equi__family": "se2", "equi__decoder__width": 96, "equi__decoder__num_heads": 5},
            "equi.decoder.num_heads",
            ["equi.decoder.width 96", "5"],
        ),
        (
            {"equi__family": "se2", "equi__decoder__width": 98, "equi__decoder__num_heads": 7},
            "equi.decoder.width",
            ["multiple of 4", "98"],
        ),
        ({"equi__family": "se2", "equi__decoder__width": 100}, "equi.decoder.width", ["multiple of 32", "100"]),
        ({"equi__family": "se2", "equi__layer": "24"}, "equi.layer", ["last", "from 0 to 23", "'24'"]),
        (
            {"equi__family": "se2", "equi__layer": "12", "student__arch": "vit_small"},
            "equi.layer",
            ["from 0 to 11", "'12'"],
        ),
        ({"equi__family": "se2", "equi__layer": "-1"}, "equi.layer", ["'-1'"]),
        ({"equi__family": "se2", "equi__layer": "first"}, "equi.layer", ["last", "'first'"]),
        (
            {"equi__family": "mixture", "equi__mixture": ["se2"]},
            "equi.mixture",
            ["two or more", "rotation, se2, color, blur;", "['se2']"],
        ),
        ({"equi__family": "mixture", "equi__mixture": []}, "equi.mixture", ["two or more", "[]"]),
        ({"equi__family": "mixture", "equi__mixture": ["se2", "se2"]}, "equi.mixture", ["different"]),
        ({"equi__family": "mixture", "equi__mixture": ["se2", "colour"]}, "equi.mixture", ["color", "'colour'"]),
        ({"equi__family": "mixture", "equi__mixture": ["se2", "mixture"]}, "equi.mixture", ["'mixture'"]),
        (
            {"equi__family": "color", "crops__gray_prob": 1.0},
            "equi.family",
            ["crops.gray_prob 1", "lower it", "rotation, se2, blur"],
        ),
        (
            {"equi__family": "mixture", "equi__mixture": ["blur", "color"], "crops__gray_prob": 1.0},
            "equi.family",
            ["crops.gray_prob 1"],
        ),
        (
            {"equi__family": "se2", "equi__include_final": True, "equi__target": "view_2"},
            "equi.include_final",
            ["equi.target 'view_2'", "set it to false"],
        ),
        (
            {"equi__family": "se2", "equi__include_final": True, "equi__target": "theta"},
            "equi.include_final",
            ["equi.target 'theta'"],
        ),
        (
            {"equi__family": "se2", "equi__only_unmasked": True, "equi__target": "masked"},
            "equi.only_unmasked",
            ["equi.target 'masked'", "set it to false"],
        ),
        (
            {"equi__family": "se2", "equi__only_unmasked": True, "ibot__mask_sample_probability": 1.0},
            "equi.only_unmasked",
            ["ibot.mask_sample_probability 1", "lower it"],
        ),
        (
            {"equi__family": "se2", "equi__target": "masked", "ibot__mask_sample_probability": 0.0},
            "ibot.mask_sample_probability",
            ["equi.target 'masked'", "above 0"],
        ),
        (
            {
                "equi__family": "se2",
                "equi__decoder__half_resolution": True,
                "student__patch_size": 7,
                "crops__local_crops_size": 98,
            },
            "equi.decoder.half_resolution",
            ["even student.patch_size", "7"],
        ),
        (
            {"equi__family": "se2", "equi__decoder__half_resolution": True, "student__patch_size": 2},
            "equi.decoder.half_resolution",
            ["4 or more", "got 2"],
        ),
        (
            {"equi__family": "se2", "equi__decoder__type": "upconv", "student__patch_size": 1},
            "equi.decoder.type",
            ["student.patch_size >= 2", "got 1"],
        ),
        (
            {"equi__family": "se2", "equi__decoder__type": "upconv", "equi__decoder__patch_fraction": 0.5},
            "equi.decoder.patch_fraction",
            ["equi.decoder.type transformer", "'upconv'"],
        ),
        (
            {"equi__family": "blur", "equi__blur_sigma_px": [0.1, 16.0], "crops__global_crops_size": 48},
            "equi.blur_sigma_px",
            ["[0.1, 16.0]", "48 pixels"],
        ),
        (
            {"equi__family": "se2", "equi__split_without_transform": True},
            "equi.split_without_transform",
            ["equi.family is 'se2'"],
        ),
        ({"equi__split_without_transform": True, "equi__dim": 1024}, "equi.dim", ["student.arch 'vit_large'", "1024"]),
        (
            {"dino__loss_weight": 0.0, "dino__koleo_loss_weight": 0.0, "ibot__loss_weight": 0.0},
            "dino.loss_weight",
            ["equi.loss_weight", "nothing to train"],
        ),
    ],
)
def test_values_that_do_not_fit_each_other_name_both_keys(
    values: dict[str, Any], key: str, parts: list[str], tables: dict[str, Any]
) -> None:
    (problem,) = find_problems(with_values(**values), **tables)
    assert problem.key == key
    assert [part for part in [key, *parts] if part not in problem.text] == []


@pytest.mark.parametrize(
    "values",
    [
        {"crops__local_crops_number": 0, "crops__local_crops_size": 7},  # no local crop, so its size is not used
        {"equi__family": None, "equi__dim": 4096},  # no branch, so its width is not used
        {"equi__family": "se2", "equi__loss_weight": 0.0},  # the control run
        {"equi__family": "se2", "equi__dim": 1023},
        {"equi__family": "se2", "equi__dim": 1024, "equi__projection_dim": 2048},
        {"equi__family": "rotation", "equi__decoder__width": 96, "equi__decoder__num_heads": 3},
        {"equi__family": "se2", "equi__layer": "0"},
        {"equi__family": "se2", "equi__layer": "23"},
        {"equi__family": None, "equi__layer": "99", "equi__mixture": ["x"]},  # no branch
        {"equi__family": "se2", "equi__mixture": ["x"], "crops__gray_prob": 1.0},  # no mixture, and no colour drawn
        {"equi__family": "mixture", "equi__mixture": ["se2", "blur"], "crops__gray_prob": 1.0},
        {"equi__family": "color", "crops__gray_prob": 0.99},
        {"equi__family": "se2", "equi__include_final": True},
        {"equi__family": "se2", "equi__only_unmasked": True, "ibot__mask_sample_probability": 0.0},
        {"equi__family": "se2", "equi__target": "masked"},
        {"equi__family": "se2", "equi__decoder__half_resolution": True, "equi__decoder__type": "upconv"},
        {"equi__family": "se2", "equi__decoder__half_resolution": True, "equi__decoder__patch_fraction": 0.5},
        {"equi__family": "se2", "equi__decoder__type": "upconv", "equi__decoder__width": 100},  # no heads there
        {"equi__family": "blur", "equi__blur_sigma_px": [0.1, 15.6], "crops__global_crops_size": 48},
        {"equi__family": "se2", "equi__blur_sigma_px": [0.1, 16.0], "crops__global_crops_size": 48},
        {"equi__split_without_transform": True, "equi__projection_dim": 2048, "equi__dim": 1024},
        {"optim__base_lr": 0.0},  # a run that must not move
        {"optim__warmup_epochs": 100},
        {"student__patch_size": 14, "crops__local_crops_size": 98},
    ],
)
def test_values_that_only_look_wrong_are_accepted(values: dict[str, Any], tables: dict[str, Any]) -> None:
    assert find_problems(with_values(**values), **tables) == []


def test_architecture_whose_heads_do_not_divide_its_width(tables: dict[str, Any]) -> None:
    vit_large = replace(tables["archs"]["vit_large"], num_heads=15)
    broken = {**tables, "archs": {**tables["archs"], "vit_large": vit_large}}
    assert keys_at_fault(Config(), broken) == ["student.arch"]


def test_a_temperature_warm_up_longer_than_a_short_run_is_refused(tables: dict[str, Any]) -> None:
    # DINOv2's default of 30 epochs must not forbid a run of 20.
    assert find_problems(with_values(optim__epochs=20), **tables) == []
