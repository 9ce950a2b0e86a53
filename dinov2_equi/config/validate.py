"""The rules of the configuration: the range of each value, and what values of different sections must agree on.

All problems are found at once, before any model is built. The names of architectures and transform families come in as
plain tables, because the config layer lies below the packages that define them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dinov2_equi.config.errors import ConfigError, Problem
from dinov2_equi.config.keys import nearest
from dinov2_equi.config.schema import Config

_NUM_CHANNELS = 3


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
_THREE_NUMBERS = Rule("three numbers, for red, green and blue", lambda value: len(value) == _NUM_CHANNELS)
_THREE_POSITIVE = Rule(
    "three numbers above 0, for red, green and blue",
    lambda value: len(value) == _NUM_CHANNELS and min(value) > 0,
)

_HEAD_RULES = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")

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
    "train.dataset_path": Rule("the name of a data set or a folder", lambda value: bool(value.strip())),
    "train.saveckp_freq": _NOT_NEGATIVE,
    "train.seed": _within(0, 2**32 - 1),
    "train.num_workers": _NOT_NEGATIVE,
    "train.OFFICIAL_EPOCH_LENGTH": _COUNT,
    "train.checkpoint_every_steps": _NOT_NEGATIVE,
    "train.checkpoint_keep": _COUNT,
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
    "equi.decoder.depth": _COUNT,
    "equi.decoder.width": _COUNT,
    "equi.decoder.num_heads": _COUNT,
    "equi.decoder.mlp_ratio": _POSITIVE,
    "data.mean": _THREE_NUMBERS,
    "data.std": _THREE_POSITIVE,
    "data.holdout_fraction": _BELOW_ONE,
    "logging.metrics_every_steps": _COUNT,
    "logging.pictures_every_steps": _NOT_NEGATIVE,
    "evaluation.eval_period_iterations": _NOT_NEGATIVE,
    "evaluation.probe_train_pairs": _COUNT,
    "evaluation.probe_test_pairs": _COUNT,
    "evaluation.probe_epochs": _COUNT,
    "evaluation.probe_size": _NOT_NEGATIVE,
    "evaluation.batch_size": _COUNT,
}
"""What each number must satisfy by itself; null passes where the schema allows it."""

_MODULES = tuple(
    f"{owner}.{name}" for owner in ("teacher", "student") for name in ("backbone", "dino_head", "ibot_head")
)

CHOICES: Mapping[str, tuple[str, ...]] = {
    "compute_precision.autocast": ("auto", "fp32", "bf16"),
    **{
        f"compute_precision.{module}.sharding_strategy": ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
        for module in _MODULES
    },
    **{
        f"compute_precision.{module}.mixed_precision.{dtype}": ("fp32", "fp16", "bf16")
        for module in _MODULES
        for dtype in ("param_dtype", "reduce_dtype", "buffer_dtype")
    },
    "vicreg.features": ("patch_mean", "cls"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.device": ("auto", "cpu", "cuda"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglufused", "identity"),
    "optim.scaling_rule": ("sqrt_wrt_1024",),
    "crops.blur": ("intended", "dinov2_released"),
    "equi.fill": ("reflect", "zeros"),
}
"""Words that a key may hold."""


def validate(
    config: Config,
    *,
    arch_widths: Mapping[str, int],
    arch_heads: Mapping[str, int],
    families: Collection[str],
) -> None:
    """Check every rule of a configuration.

    Args:
        config: values of the right types.
        arch_widths: token width by architecture name.
        arch_heads: number of attention heads by architecture name.
        families: names of the transform families.

    Raises:
        ConfigError: listing all problems; each names its key, the value and what to do.
    """
    problems = find_problems(config, arch_widths=arch_widths, arch_heads=arch_heads, families=families)
    if problems:
        raise ConfigError(problems)


def find_problems(
    config: Config,
    *,
    arch_widths: Mapping[str, int],
    arch_heads: Mapping[str, int],
    families: Collection[str],
) -> list[Problem]:
    """Return all problems of a configuration; rules between values are checked once each value is right by itself."""
    choices = {**CHOICES, "student.arch": tuple(arch_widths), "equi.family": tuple(families)}
    problems = [*_rule_problems(config), *_choice_problems(config, choices)]
    if problems:
        return problems
    width = arch_widths[config.student.arch]
    return [
        *_backbone_problems(config, width, arch_heads[config.student.arch]),
        *_crop_problems(config),
        *_schedule_problems(config),
        *_loss_problems(config),
        *(_branch_problems(config, width) if config.equi.family is not None else ()),
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
    if vicreg.loss_weight > 0 and config.train.batch_size_per_gpu == 1:
        text = "train.batch_size_per_gpu must be at least 2 with VICReg, whose terms are statistics of the batch, got 1"
        yield Problem("train.batch_size_per_gpu", text)


def _branch_problems(config: Config, backbone_width: int) -> Iterator[Problem]:
    equi = config.equi
    projected = equi.projection_dim is not None
    width = equi.projection_dim if equi.projection_dim is not None else backbone_width
    source = "equi.projection_dim" if projected else f"the width of student.arch {config.student.arch!r},"
    if equi.dim is not None and equi.dim >= width:
        text = f"equi.dim must be below {source} {width}, got {equi.dim}: the other channels are the invariant part"
        yield Problem("equi.dim", text)
    if equi.dim is None and width < 4:
        yield Problem("equi.dim", f"equi.dim is a quarter of {source} {width} when null: set a larger width")
    yield from _decoder_problems(equi.decoder.width, equi.decoder.num_heads)


def _decoder_problems(width: int | None, num_heads: int | None) -> Iterator[Problem]:
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
