"""The rules of the configuration: the range of each value, and what values of different sections must agree on.

All problems are found at once, before any model is built. The names of architectures and transform families come in as
plain tables, because the config layer lies below the packages that define them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dinov2_equi.config.errors import ConfigError, Problem
from dinov2_equi.config.keys import nearest
from dinov2_equi.config.schema import Config

_RGB_CHANNELS = 3
_COLOR_FAMILY = "color"
_MAX_SIGMA_PX, _MAX_ZOOM = 16, 4
_MAX_CORNER_PX = 55
"""Below a quarter of 224: the four corners stay the corners of a convex shape."""


class ArchShape(Protocol):
    """What the rules need to know of an architecture."""

    @property
    def embed_dim(self) -> int:
        """Width of a token."""

    @property
    def depth(self) -> int:
        """Number of blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""


@dataclass(frozen=True)
class Rule:
    """What one value must satisfy, in words and as a test."""

    wanted: str
    holds: Callable[[Any], bool]


def _at_least(low: float) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def _within(low: float, high: float) -> Rule:
    return Rule(f"in [{low}, {high}]", lambda value: low <= value <= high)


def _fraction(*, with_zero: bool, with_one: bool) -> Rule:
    brackets = ("[" if with_zero else "(", "]" if with_one else ")")
    return Rule(
        f"in {brackets[0]}0, 1{brackets[1]}",
        lambda value: (value > 0 or (with_zero and value == 0)) and (value < 1 or (with_one and value == 1)),
    )


def _interval(*, with_zero: bool) -> Rule:
    sign = "<=" if with_zero else "<"
    return Rule(
        f"two numbers [min, max] with 0 {sign} min <= max <= 1",
        lambda value: len(value) == 2 and (value[0] > 0 or (with_zero and value[0] == 0)) and value[0] <= value[1] <= 1,
    )


_POSITIVE = Rule("above 0", lambda value: value > 0)
_COUNT = _at_least(1)
_NOT_NEGATIVE = _at_least(0)
_PROBABILITY = _fraction(with_zero=True, with_one=True)
_BELOW_ONE = _fraction(with_zero=True, with_one=False)

_HEAD_RULES = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")

_EVALUATIONS = ("knn", "linear", "equivariance")

RULES: Mapping[str, Rule] = {
    "dino.loss_weight": _NOT_NEGATIVE,
    "dino.koleo_loss_weight": _NOT_NEGATIVE,
    "ibot.loss_weight": _NOT_NEGATIVE,
    **{f"{section}.{name}": _COUNT for section in ("dino", "ibot") for name in _HEAD_RULES},
    "ibot.mask_sample_probability": _PROBABILITY,
    "ibot.mask_ratio_min_max": _interval(with_zero=True),
    **{f"vicreg.{name}_weight": _NOT_NEGATIVE for name in ("loss", "invariance", "variance", "covariance")},
    "vicreg.expander_dim": _COUNT,
    "vicreg.expander_nlayers": _COUNT,
    "train.batch_size_per_gpu": _COUNT,
    "train.gradient_accumulation_steps": _COUNT,
    "train.dataset_path": Rule("the name of a data set or a folder", lambda value: bool(value.strip())),
    "train.saveckp_freq": _NOT_NEGATIVE,
    "train.seed": _within(0, 2**32 - 1),
    "train.num_workers": _NOT_NEGATIVE,
    "train.OFFICIAL_EPOCH_LENGTH": _COUNT,
    "train.checkpoint_every_steps": _NOT_NEGATIVE,
    "train.checkpoint_keep": _COUNT,
    "train.max_nonfinite_steps": _COUNT,
    "train.watchdog_seconds": _NOT_NEGATIVE,
    "train.num_threads": _NOT_NEGATIVE,
    "student.patch_size": _COUNT,
    "student.drop_path_rate": _BELOW_ONE,
    "student.layerscale": _NOT_NEGATIVE,
    "student.block_chunks": _NOT_NEGATIVE,
    "student.num_register_tokens": _NOT_NEGATIVE,
    "student.interpolate_offset": _NOT_NEGATIVE,
    "teacher.momentum_teacher": _PROBABILITY,
    "teacher.final_momentum_teacher": _PROBABILITY,
    "teacher.warmup_teacher_temp": _POSITIVE,
    "teacher.teacher_temp": _POSITIVE,
    "teacher.warmup_teacher_temp_epochs": _NOT_NEGATIVE,
    "optim.epochs": _COUNT,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.weight_decay_end": _NOT_NEGATIVE,
    "optim.base_lr": _NOT_NEGATIVE,
    "optim.lr": _NOT_NEGATIVE,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.min_lr": _NOT_NEGATIVE,
    "optim.clip_grad": _NOT_NEGATIVE,
    "optim.freeze_last_layer_epochs": _NOT_NEGATIVE,
    "optim.patch_embed_lr_mult": _NOT_NEGATIVE,
    "optim.layerwise_decay": _fraction(with_zero=False, with_one=True),
    "optim.adamw_beta1": _BELOW_ONE,
    "optim.adamw_beta2": _BELOW_ONE,
    "crops.global_crops_scale": _interval(with_zero=False),
    "crops.local_crops_number": _NOT_NEGATIVE,
    "crops.local_crops_scale": _interval(with_zero=False),
    "crops.global_crops_size": _COUNT,
    "crops.local_crops_size": _COUNT,
    "crops.color_jitter_prob": _PROBABILITY,
    "crops.gray_prob": _PROBABILITY,
    "crops.solarize_prob": _PROBABILITY,
    "equi.loss_weight": _NOT_NEGATIVE,
    "equi.num_steps": _COUNT,
    "equi.dim": _COUNT,
    "equi.projection_dim": _COUNT,
    "equi.max_rotation_deg": _within(0, 180),
    "equi.max_translation_px": _within(0, 112),
    "equi.max_brightness": _PROBABILITY,
    "equi.max_contrast": _PROBABILITY,
    "equi.max_saturation": _PROBABILITY,
    "equi.max_hue": _within(0, 0.5),
    "equi.blur_sigma_px": Rule(
        f"two numbers [min, max] with 0 <= min <= max <= {_MAX_SIGMA_PX}",
        lambda value: len(value) == 2 and 0 <= value[0] <= value[1] <= _MAX_SIGMA_PX,
    ),
    "equi.max_zoom": Rule(f"above 1 and at most {_MAX_ZOOM}", lambda value: 1 < value <= _MAX_ZOOM),
    "equi.max_corner_px": _within(0, _MAX_CORNER_PX),
    "equi.decoder.depth": _COUNT,
    "equi.decoder.width": _COUNT,
    "equi.decoder.num_heads": _COUNT,
    "equi.decoder.mlp_ratio": _POSITIVE,
    "equi.decoder.patch_fraction": _fraction(with_zero=False, with_one=True),
    "data.in_channels": _COUNT,
    "data.value_range": Rule(
        "two numbers [low, high] with low < high, or none",
        lambda value: not value or (len(value) == 2 and value[0] < value[1]),
    ),
    "data.mean": Rule("numbers, one for each channel", lambda value: len(value) > 0),
    "data.std": Rule("numbers above 0", lambda value: len(value) > 0 and min(value) > 0),
    "data.max_bad_fraction": _PROBABILITY,
    "data.holdout_fraction": _BELOW_ONE,
    "logging.metrics_every_steps": _COUNT,
    "logging.diagnostics_every_steps": _NOT_NEGATIVE,
    "logging.pictures_every_steps": _NOT_NEGATIVE,
    "evaluation.eval_period_iterations": _NOT_NEGATIVE,
    "evaluation.tasks": Rule(f"a list of {', '.join(_EVALUATIONS)}", lambda value: set(value) <= set(_EVALUATIONS)),
    "evaluation.max_images": _COUNT,
    "evaluation.probe_train_pairs": _COUNT,
    "evaluation.probe_test_pairs": _COUNT,
    "evaluation.probe_epochs": _COUNT,
    "evaluation.probe_size": _NOT_NEGATIVE,
    "evaluation.batch_size": _COUNT,
}
"""What each number must satisfy by itself; null passes where the schema allows it."""

_LAYOUTS: Mapping[str, str] = {
    "NO_SHARD": "whole",
    "SHARD_GRAD_OP": "over all processes",
    "FULL_SHARD": "over all processes",
    "HYBRID_SHARD": "over the processes of a machine",
    "hybrid": "over the processes of a machine",
}
"""Where the rows of a parameter lie, by sharding strategy."""

_MODULES = tuple(
    f"{owner}.{name}" for owner in ("teacher", "student") for name in ("backbone", "dino_head", "ibot_head")
)

CHOICES: Mapping[str, tuple[str, ...]] = {
    "compute_precision.autocast": ("auto", "fp32", "bf16"),
    **{f"compute_precision.{module}.sharding_strategy": tuple(_LAYOUTS) for module in _MODULES},
    **{
        f"compute_precision.{module}.mixed_precision.{dtype}": ("fp32", "fp16", "bf16")
        for module in _MODULES
        for dtype in ("param_dtype", "reduce_dtype", "buffer_dtype")
    },
    "vicreg.features": ("patch_mean", "cls"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.activation_checkpointing": ("none", "selective", "full"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglufused", "identity"),
    "optim.scaling_rule": ("sqrt_wrt_1024",),
    "crops.blur": ("intended", "dinov2_released"),
    "data.augment_on": ("cpu", "device"),
    "equi.fill": ("reflect", "zeros"),
    "equi.target": ("path", "untransformed", "view_2", "view_1", "masked", "theta"),
    "equi.source_2": ("student", "teacher"),
    "equi.decoder.type": ("transformer", "upconv"),
    "evaluation.best_metric": ("", "knn", "linear", "r2_rotation"),
}
"""Words that a key may hold."""


def validate(
    config: Config,
    *,
    archs: Mapping[str, ArchShape],
    families: Collection[str],
) -> None:
    """Check every rule of a configuration.

    Args:
        config: values of the right types.
        archs: shape by architecture name.
        families: names of the transform families.

    Raises:
        ConfigError: listing all problems; each names its key, the value and what to do.
    """
    problems = find_problems(config, archs=archs, families=families)
    if problems:
        raise ConfigError(problems)


def find_problems(
    config: Config,
    *,
    archs: Mapping[str, ArchShape],
    families: Collection[str],
) -> list[Problem]:
    """Return all problems of a configuration; rules between values are checked once each value is right by itself."""
    choices = {**CHOICES, "student.arch": tuple(archs), "equi.family": tuple(families)}
    problems = [*_rule_problems(config), *_choice_problems(config, choices)]
    if problems:
        return problems
    arch = archs[config.student.arch]
    return [
        *_backbone_problems(config, arch.embed_dim, arch.num_heads),
        *_crop_problems(config),
        *_channel_problems(config, families),
        *_schedule_problems(config),
        *_sharding_problems(config),
        *_loss_problems(config),
        *_equi_problems(config, arch, families),
    ]


def value_at(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _rule_problems(config: Config) -> Iterator[Problem]:
    for key, rule in RULES.items():
        value = value_at(config, key)
        if value is not None and not rule.holds(value):
            yield Problem(key, f"{key} must be {rule.wanted}, got {value!r}")


def _choice_problems(config: Config, choices: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    for key, words in choices.items():
        value = value_at(config, key)
        if value is not None and value not in words:
            guess = nearest(value, words)
            hint = f"; did you mean {guess!r}?" if guess and len(words) > 1 else ""
            yield Problem(key, f"{key} must be one of {', '.join(words)}, got {value!r}{hint}")


def _backbone_problems(config: Config, width: int, num_heads: int) -> Iterator[Problem]:
    if width % num_heads:
        text = f"student.arch {config.student.arch!r} has {num_heads} heads, which do not divide its width {width}"
        yield Problem("student.arch", text)


def _crop_problems(config: Config) -> Iterator[Problem]:
    patch = config.student.patch_size
    keys = ["crops.global_crops_size"]
    if config.crops.local_crops_number > 0:
        keys.append("crops.local_crops_size")
    if config.evaluation.probe_size > 0:
        keys.append("evaluation.probe_size")
    for key in keys:
        size = value_at(config, key)
        if size % patch:
            below, above = size // patch * patch, -(-size // patch) * patch
            advice = f"{above}" if below == 0 else f"{below} or {above}"
            yield Problem(key, f"{key} must be a multiple of student.patch_size {patch}, got {size}; set {advice}")


def is_rgb(config: Config) -> bool:
    """Return whether images are read as photographs, not channel by channel."""
    return config.data.in_channels == _RGB_CHANNELS and not config.data.value_range


def _channel_problems(config: Config, families: Collection[str]) -> Iterator[Problem]:
    count = config.data.in_channels
    for key in ("data.mean", "data.std"):
        value = value_at(config, key)
        if len(value) != count:
            wanted = "three numbers, for red, green and blue" if count == _RGB_CHANNELS else f"{count} numbers"
            text = (
                f"{key} must be {wanted} (data.in_channels is {count}), got {list(value)!r}; scripts/dataset_stats.py "
                "measures them"
            )
            yield Problem(key, text)
    drawn = config.equi.mixture if config.equi.family == "mixture" else [config.equi.family]
    if _COLOR_FAMILY in drawn and not is_rgb(config):
        others = ", ".join(name for name in families if name not in (_COLOR_FAMILY, "mixture"))
        text = (
            f"equi.family {config.equi.family!r} changes hue and saturation, which only photographs have: with "
            f"data.in_channels {count} and data.value_range {list(config.data.value_range)} choose among {others}"
        )
        yield Problem("equi.family", text)


def _schedule_problems(config: Config) -> Iterator[Problem]:
    epochs = config.optim.epochs
    for key in ("optim.warmup_epochs", "optim.freeze_last_layer_epochs"):
        value = value_at(config, key)
        if value > epochs:
            yield Problem(
                key, f"{key} must not exceed optim.epochs {epochs}, got {value}; lower it or train for longer"
            )
    if 0 < config.optim.base_lr < config.optim.min_lr:
        text = f"optim.min_lr must not exceed optim.base_lr {config.optim.base_lr}, got {config.optim.min_lr}"
        yield Problem("optim.min_lr", text)


def _sharding_problems(config: Config) -> Iterator[Problem]:
    for name in ("backbone", "dino_head", "ibot_head"):
        key = f"compute_precision.teacher.{name}.sharding_strategy"
        teacher, student = value_at(config, key), value_at(config, key.replace("teacher", "student"))
        if _LAYOUTS[teacher] != _LAYOUTS[student]:
            text = (
                f"{key} {teacher} lays parameters {_LAYOUTS[teacher]}, and that of the student, {student}, "
                f"{_LAYOUTS[student]}: the teacher is a moving average of the student, set both to the same"
            )
            yield Problem(key, text)


def _loss_problems(config: Config) -> Iterator[Problem]:
    dino, ibot, vicreg, equi = config.dino, config.ibot, config.vicreg, config.equi
    if equi.loss_weight > 0 and equi.family is None:
        text = (
            f"equi.loss_weight {equi.loss_weight} needs a transform: set equi.family, for example to se2, or set "
            "equi.loss_weight to 0"
        )
        yield Problem("equi.loss_weight", text)
    weights = (dino.loss_weight, dino.koleo_loss_weight, ibot.loss_weight, vicreg.loss_weight, equi.loss_weight)
    if max(weights) == 0:
        text = (
            "dino.loss_weight, dino.koleo_loss_weight, ibot.loss_weight, vicreg.loss_weight and equi.loss_weight are "
            "all 0, so there is nothing to train; set at least one"
        )
        yield Problem("dino.loss_weight", text)
    train = config.train
    if vicreg.loss_weight > 0 and train.batch_size_per_gpu * train.gradient_accumulation_steps == 1:
        text = "train.batch_size_per_gpu must be at least 2 with VICReg, whose terms are statistics of the batch, got 1"
        yield Problem("train.batch_size_per_gpu", text)


def _equi_problems(config: Config, arch: ArchShape, families: Collection[str]) -> Iterator[Problem]:
    equi = config.equi
    if equi.family is not None or equi.split_without_transform:
        yield from _split_problems(config, arch.embed_dim)
    if equi.family is None:
        return
    if equi.split_without_transform:
        text = (
            f"equi.split_without_transform is for runs without a transform, and equi.family is {equi.family!r}, which "
            "divides the features anyway: set one to false, or the other to null"
        )
        yield Problem("equi.split_without_transform", text)
    yield from _family_problems(config, families)
    yield from _layer_problems(config.equi.layer, arch.depth)
    yield from _objective_problems(config)
    yield from _decoder_problems(config)


def _layer_problems(layer: str, depth: int) -> Iterator[Problem]:
    if layer != "last" and not (layer.isdecimal() and int(layer) < depth):
        text = f"equi.layer must be last, or the number of a block from 0 to {depth - 1}, got {layer!r}"
        yield Problem("equi.layer", text)


def _objective_problems(config: Config) -> Iterator[Problem]:
    equi = config.equi
    if equi.include_final and equi.target != "path":
        text = (
            f"equi.include_final adds the end of the path, and equi.target {equi.target!r} has no path: set it to false"
        )
        yield Problem("equi.include_final", text)
    if equi.only_unmasked and config.ibot.mask_sample_probability == 1:
        text = (
            "equi.only_unmasked needs images without a mask, and ibot.mask_sample_probability 1 masks every crop: "
            "lower it"
        )
        yield Problem("equi.only_unmasked", text)
    if equi.target != "masked":
        return
    if equi.only_unmasked:
        text = "equi.only_unmasked contradicts equi.target 'masked', which reconstructs what is hidden: set it to false"
        yield Problem("equi.only_unmasked", text)
    if config.ibot.mask_sample_probability == 0:
        text = "equi.target 'masked' needs masks: set ibot.mask_sample_probability above 0"
        yield Problem("ibot.mask_sample_probability", text)


def _split_problems(config: Config, backbone_width: int) -> Iterator[Problem]:
    equi = config.equi
    projected = equi.projection_dim is not None
    width = equi.projection_dim if equi.projection_dim is not None else backbone_width
    source = "equi.projection_dim" if projected else f"the width of student.arch {config.student.arch!r},"
    if equi.dim is not None and equi.dim >= width:
        text = f"equi.dim must be below {source} {width}, got {equi.dim}: the other channels are the invariant part"
        yield Problem("equi.dim", text)
    if equi.dim is None and width < 4:
        yield Problem("equi.dim", f"equi.dim is a quarter of {source} {width} when null: set a larger width")


def _family_problems(config: Config, families: Collection[str]) -> Iterator[Problem]:
    drawn = config.equi.mixture if config.equi.family == "mixture" else [config.equi.family]
    if config.equi.family == "mixture":
        known = [name for name in families if name != "mixture"]
        strangers = [name for name in drawn if name not in known]
        if strangers or len(set(drawn)) != len(drawn) or len(drawn) < 2:
            text = f"equi.mixture must name two or more different families of {', '.join(known)}; got {list(drawn)!r}"
            yield Problem("equi.mixture", text)
    if "color" in drawn and config.crops.gray_prob == 1:
        text = (
            f"equi.family {config.equi.family!r} needs colours, and crops.gray_prob 1 takes them out of every crop: "
            f"lower it, or draw from {', '.join(name for name in families if name not in ('color', 'mixture'))}"
        )
        yield Problem("equi.family", text)
    radius, side = math.ceil(3 * config.equi.blur_sigma_px[1]), config.crops.global_crops_size
    if "blur" in drawn and radius >= side:
        text = f"equi.blur_sigma_px {list(config.equi.blur_sigma_px)} is too wide for crops of {side} pixels"
        yield Problem("equi.blur_sigma_px", text)


def _decoder_problems(config: Config) -> Iterator[Problem]:
    decoder, patch = config.equi.decoder, config.student.patch_size
    if decoder.half_resolution and (patch % 2 or patch < 4):
        text = f"equi.decoder.half_resolution needs an even student.patch_size of 4 or more, got {patch}"
        yield Problem("equi.decoder.half_resolution", text)
    if decoder.type == "upconv" and patch < 2:
        text = f"equi.decoder.type upconv doubles the grid at least once: needs student.patch_size >= 2, got {patch}"
        yield Problem("equi.decoder.type", text)
    if decoder.type == "transformer":
        yield from _transformer_problems(decoder.width, decoder.num_heads)
    elif decoder.patch_fraction < 1:
        text = f"equi.decoder.patch_fraction below 1 needs equi.decoder.type transformer, got {decoder.type!r}"
        yield Problem("equi.decoder.patch_fraction", text)


def _transformer_problems(width: int | None, num_heads: int | None) -> Iterator[Problem]:
    if width is None:
        if num_heads is not None:
            text = f"equi.decoder.num_heads {num_heads} must divide equi.decoder.width, which is null: set both"
            yield Problem("equi.decoder.num_heads", text)
        return
    if width % 4:
        yield Problem("equi.decoder.width", f"equi.decoder.width must be a multiple of 4, got {width}")
    if num_heads is None and width % 32:
        text = f"equi.decoder.width must be a multiple of 32 while equi.decoder.num_heads is null, got {width}"
        yield Problem("equi.decoder.width", text)
    if num_heads is not None and width % num_heads:
        text = f"equi.decoder.num_heads must divide equi.decoder.width {width}, got {num_heads}"
        yield Problem("equi.decoder.num_heads", text)
