"""Every key of the configuration does something: none is accepted and then forgotten."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2_equi.config import schema
from dinov2_equi.config.derive import derive
from dinov2_equi.config.errors import ConfigError
from dinov2_equi.config.keys import leaf_types
from dinov2_equi.config.load import WITHOUT_EFFECT, load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import CHOICES
from dinov2_equi.data.loaders import on_device
from dinov2_equi.fsdp.checkpoint import sha256_of_tensors
from dinov2_equi.train import build, settings
from dinov2_equi.train.step import train_step

Run = Callable[..., int]
MakeConfig = Callable[..., Config]
DEBUG_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug_cpu.yaml"

READERS = ("dinov2_equi.config.derive", "dinov2_equi.train", "dinov2_equi.run")
"""The modules whose reading counts: validation and the dump of the whole configuration touch every key."""

ONE_WORD = {key for key, words in CHOICES.items() if len(words) == 1}
"""Keys that can hold one value alone, which the validation has seen: there is nothing to choose."""


def without_effect(key: str) -> bool:
    return any(f"{key}.".startswith(f"{dead}.") for dead in WITHOUT_EFFECT)


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set that fills with the dotted key of every leaf that the package reads from its configuration."""
    read: set[str] = set()
    prefixes: dict[int, str] = {}  # of the sections of the configurations in use, by identity
    in_use: list[Config] = []  # keeps them alive, and with them their identity
    leaves = leaf_types()

    def enter(section: Any, prefix: str) -> None:
        prefixes[id(section)] = prefix
        for field in dataclasses.fields(section):
            value = object.__getattribute__(section, field.name)
            if dataclasses.is_dataclass(value):
                enter(value, f"{prefix}{field.name}.")

    def record(section: Any, name: str) -> Any:
        prefix = prefixes.get(id(section))
        if prefix is not None and f"{prefix}{name}" in leaves:
            reader = str(sys._getframe(1).f_globals["__name__"])
            if reader.startswith(READERS):
                read.add(f"{prefix}{name}")
        return object.__getattribute__(section, name)

    def load_and_enter(*arguments: Any, **tables: Any) -> Config:
        cfg = load_config(*arguments, **tables)
        in_use.append(cfg)
        enter(cfg, "")
        return cfg

    for section in vars(schema).values():
        if dataclasses.is_dataclass(section):
            monkeypatch.setattr(section, "__getattribute__", record, raising=False)
    monkeypatch.setattr(settings, "load_config", load_and_enter)
    return read


OFF = (
    "equi.family=null",
    "equi.loss_weight=0",
    "evaluation.probe=false",
    "evaluation.tasks=[knn]",
    "logging.report=false",
)
SHORT = ("train.OFFICIAL_EPOCH_LENGTH=1", "logging.pictures_every_steps=1", "evaluation.eval_period_iterations=1")


def test_a_key_is_not_read(tmp_path: Path, command: Run, keys_read: set[str]) -> None:
    # The run folder of the configuration counts where the command names none.
    overrides = ["ibot.separate_head=true", "vicreg.loss_weight=1", f"train.output_dir={tmp_path / 'on'}"]
    assert command("--config-file", str(DEBUG_CONFIG), *SHORT, *overrides) == 0
    off = [*OFF, f"train.output_dir={tmp_path / 'off'}"]  # without a transform there are keys of their own
    assert command("--config-file", str(DEBUG_CONFIG), *SHORT, *off) == 0
    unread = [key for key in leaf_types() if key not in keys_read | ONE_WORD and not without_effect(key)]
    assert not unread
    told_apart = [key for key in keys_read if without_effect(key)]
    assert not told_apart, "said to have no effect, and read"


def test_the_branch_reads_its_settings_while_it_is_off(tmp_path: Path, debug_run: Run, keys_read: set[str]) -> None:
    assert debug_run(tmp_path, *SHORT, *OFF) == 0
    switches = {"equi.family", "equi.loss_weight", "equi.split_without_transform"}
    assert {key for key in keys_read if key.startswith("equi.")} <= switches


# ------------------------------------------------------------------------------------------------ read, and used

DECIDES_WHAT_IS_LEARNED: dict[str, tuple[str, ...]] = {
    "dino.head_n_prototypes": ("32",),
    "dino.head_bottleneck_dim": ("8",),
    "dino.head_nlayers": ("2",),
    "dino.head_hidden_dim": ("16",),
    "dino.loss_weight": ("0.5",),
    "dino.koleo_loss_weight": ("0", "0.5"),
    "ibot.head_n_prototypes": ("32",),
    "ibot.head_bottleneck_dim": ("8",),
    "ibot.head_nlayers": ("2",),
    "ibot.head_hidden_dim": ("16",),
    "ibot.loss_weight": ("0", "0.5"),
    "ibot.mask_sample_probability": ("1",),
    "ibot.mask_ratio_min_max": ("[0.5,0.6]",),
    "ibot.separate_head": ("false",),
    "vicreg.loss_weight": ("0", "0.5"),
    "vicreg.invariance_weight": ("1",),
    "vicreg.variance_weight": ("1",),
    "vicreg.covariance_weight": ("10",),
    "vicreg.features": ("cls",),
    "vicreg.expander_dim": ("16",),
    "vicreg.expander_nlayers": ("2",),
    "train.batch_size_per_gpu": ("3",),
    "train.gradient_accumulation_steps": ("2",),
    "train.dataset_path": ("synthetic:length=32:size=96x128",),
    "train.seed": ("1",),
    "train.centering": ("sinkhorn_knopp",),
    "train.OFFICIAL_EPOCH_LENGTH": ("3",),
    "compute_precision.autocast": ("bf16",),
    "student.arch": ("vit_micro",),
    "student.patch_size": ("4",),
    "student.drop_path_rate": ("0", "0.5"),
    "student.layerscale": ("0", "0.1"),
    "student.drop_path_uniform": ("false",),
    "student.ffn_layer": ("swiglu",),
    "student.block_chunks": ("3",),
    "student.qkv_bias": ("false",),
    "student.proj_bias": ("false",),
    "student.ffn_bias": ("false",),
    "student.num_register_tokens": ("2",),
    "student.interpolate_antialias": ("true",),
    "student.interpolate_offset": ("0",),
    "teacher.momentum_teacher": ("0.5",),
    "teacher.final_momentum_teacher": ("0.995",),
    "teacher.warmup_teacher_temp": ("0.05",),
    "teacher.teacher_temp": ("0.06",),
    "teacher.warmup_teacher_temp_epochs": ("0", "2"),
    "optim.epochs": ("3",),
    "optim.weight_decay": ("0.1",),
    "optim.weight_decay_end": ("0.1",),
    "optim.base_lr": ("0.001",),
    "optim.warmup_epochs": ("0", "2"),
    "optim.min_lr": ("0.001",),
    "optim.clip_grad": ("0", "0.01"),
    "optim.freeze_last_layer_epochs": ("0", "2"),
    "optim.patch_embed_lr_mult": ("1",),
    "optim.layerwise_decay": ("0.5",),
    "optim.adamw_beta1": ("0.5",),
    "optim.adamw_beta2": ("0.9",),
    "crops.global_crops_scale": ("[0.5,0.6]",),
    "crops.local_crops_number": ("0", "3"),
    "crops.local_crops_scale": ("[0.1,0.2]",),
    "crops.global_crops_size": ("40",),
    "crops.local_crops_size": ("24",),
    "crops.blur": ("dinov2_released",),
    "crops.color_jitter_prob": ("0",),
    "crops.gray_prob": ("1",),
    "crops.solarize_prob": ("1",),
    "equi.family": ("rotation",),
    "equi.loss_weight": ("0", "0.5"),
    "equi.num_steps": ("3",),
    "equi.include_final": ("true",),
    "equi.target": ("untransformed", "view_2", "view_1", "masked", "theta"),
    "equi.layer": ("0", "1"),
    "equi.source_2": ("teacher",),
    "equi.only_unmasked": ("true",),
    "equi.dim": ("16",),
    "equi.projection_dim": ("64",),
    "equi.split_without_transform": ("true",),
    "equi.use_cls": ("true",),
    "equi.fill": ("zeros",),
    "equi.max_rotation_deg": ("10",),
    "equi.max_translation_px": ("50",),
    "equi.max_brightness": ("0.1",),
    "equi.max_contrast": ("0.1",),
    "equi.max_saturation": ("0.4",),
    "equi.max_hue": ("0.4",),
    "equi.blur_sigma_px": ("[0.1,1]", "[1,2]"),
    "equi.max_zoom": ("2",),
    "equi.max_corner_px": ("40",),
    "equi.mixture": ("[rotation,blur]",),
    "equi.decoder.type": ("upconv",),
    "equi.decoder.depth": ("1",),
    "equi.decoder.width": ("96",),
    "equi.decoder.num_heads": ("4",),
    "equi.decoder.mlp_ratio": ("2",),
    "equi.decoder.shared": ("false",),
    "equi.decoder.patch_fraction": ("0.5",),
    "equi.decoder.half_resolution": ("true",),
    "data.mean": ("[0.5,0.5,0.5]",),
    "data.std": ("[0.5,0.5,0.5]",),
    "data.augment_on": ("device",),
    "data.holdout_fraction": ("0.5",),
    "data.holdout_path": ("synthetic:length=8:seed=1",),
}
"""Keys with other values than those of the run that they are compared with."""

ACTS_ONLY_WITH: dict[str, tuple[str, ...]] = {
    **{f"equi.max_{name}": ("equi.family=color",) for name in ("brightness", "contrast", "saturation", "hue")},
    "equi.blur_sigma_px": ("equi.family=blur",),
    "equi.max_zoom": ("equi.family=scale",),
    "equi.max_corner_px": ("equi.family=perspective",),
    "equi.mixture": ("equi.family=mixture",),
    "equi.split_without_transform": ("equi.family=null", "equi.loss_weight=0"),
}
"""Keys whose value counts in other runs than the one of `COMPARED`: what must be set for it to count."""

WEIGHTS_TO_START_FROM = {"student.pretrained_weights", "MODEL.WEIGHTS"}

DECIDE_HOW_FILES_ARE_READ = {"data.in_channels", "data.value_range"}

TEACHES_NOTHING: dict[str, str] = {
    "train.num_workers": "1",
    "train.checkpoint_every_steps": "1",
    "train.checkpoint_keep": "1",
    "train.async_checkpoint": "true",
    "train.max_nonfinite_steps": "1",
    "train.watchdog_seconds": "600",
    "train.activation_checkpointing": "full",
    **{
        f"compute_precision.{owner}.{name}.sharding_strategy": "FULL_SHARD"
        for owner in ("teacher", "student")
        for name in ("backbone", "dino_head", "ibot_head")
    },
    **{
        f"compute_precision.{owner}.{name}.mixed_precision.param_dtype": "fp32"
        for owner in ("teacher", "student")
        for name in ("backbone", "dino_head", "ibot_head")
    },
    **{
        f"compute_precision.student.{name}.mixed_precision.reduce_dtype": "bf16"
        for name in ("backbone", "dino_head", "ibot_head")
    },
    "logging.metrics_every_steps": "3",
    "logging.diagnostics_every_steps": "2",
    "logging.tensorboard": "true",
    "logging.report": "true",
    "logging.pictures_every_steps": "2",
    "data.max_bad_fraction": "0.2",
    "evaluation.eval_period_iterations": "1",
    "evaluation.in_process": "false",
    "evaluation.probe": "true",
    "evaluation.probe_train_pairs": "16",
    "evaluation.probe_test_pairs": "16",
    "evaluation.probe_epochs": "1",
    "evaluation.probe_size": "24",
    "evaluation.batch_size": "7",
    "evaluation.tasks": "[equivariance]",
    "evaluation.train_dataset_path": "small_photos:split=TRAIN",
    "evaluation.val_dataset_path": "small_photos:split=TEST",
    "evaluation.max_images": "9",
    "evaluation.best_metric": "r2_rotation",
}
"""Keys that decide what a run writes, how fast, and how several processes share it (see `test_sharded_ranks.py`)."""

PLACE = {"train.output_dir", "train.device", "train.num_threads", "train.compile"}
"""Where and by what a run is computed and lies; all but the folder may move rounding."""

COMPARED = (
    "train.OFFICIAL_EPOCH_LENGTH=2",
    "ibot.separate_head=true",
    "vicreg.loss_weight=1",
    "vicreg.expander_dim=32",
    "equi.decoder.width=64",
    "equi.decoder.num_heads=2",
)
"""Four steps, in two epochs."""


def test_nobody_knows_what_a_new_key_does() -> None:
    learn = {*DECIDES_WHAT_IS_LEARNED, *DECIDE_HOW_FILES_ARE_READ, *WEIGHTS_TO_START_FROM}
    listed = {*learn, *TEACHES_NOTHING, *PLACE, *ONE_WORD}
    assert {key for key in leaf_types() if not without_effect(key)} == listed


def learned(cfg: Config) -> str:
    """Return a hash of all weights and centres after training without anything around it."""
    derived = derive(cfg, world_size=1)
    device = torch.device("cpu")
    dataset, _ = build.build_datasets(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.train.seed)
        state = build.build_state(cfg, derived, device)
        schedules = build.build_schedules(cfg, derived)
        state.model.train()
        for batch in build.build_loader(cfg, derived, dataset, start_step=0, pin_memory=False):
            train_step(state, on_device(batch, device), schedules.at(state.step), cfg, device)
    return sha256_of_tensors(state.model.state_dict())


@pytest.fixture(scope="module")
def learned_with(make_config: MakeConfig) -> Callable[..., str]:
    """Return a function to the hash of the compared run with further settings; the same run is trained once."""

    @functools.cache
    def learned_once(*settings_of_the_run: str) -> str:
        return learned(make_config(*COMPARED, *settings_of_the_run))

    return learned_once


@pytest.fixture(scope="module")
def compared(learned_with: Callable[..., str]) -> str:
    return learned_with()


def test_a_key_is_compared_in_a_run_of_its_own_without_need() -> None:
    assert set(ACTS_ONLY_WITH) <= set(DECIDES_WHAT_IS_LEARNED)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in DECIDES_WHAT_IS_LEARNED.items() for value in values]
)
def test_a_key_changes_nothing(learned_with: Callable[..., str], key: str, value: str) -> None:
    around = ACTS_ONLY_WITH.get(key, ())
    assert learned_with(*around, f"{key}={value}") != learned_with(*around)


def test_a_key_acts_where_it_is_said_to_do_nothing(learned_with: Callable[..., str], compared: str) -> None:
    refused = "equi.split_without_transform"  # the validation sees to that one
    assert learned_with(*(f"{key}={DECIDES_WHAT_IS_LEARNED[key][0]}" for key in ACTS_ONLY_WITH if key != refused)) == (
        compared
    )
    with pytest.raises(ConfigError, match=refused):
        learned_with(f"{refused}=true")


def test_keys_of_how_files_are_read_change_nothing(tmp_path: Path, make_config: MakeConfig) -> None:
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 2**16, (40, 48), np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    one_channel = ("data.in_channels=1", "data.mean=[0.5]", "data.std=[0.2]")
    runs = ((), one_channel, (*one_channel, "data.value_range=[0,4095]"))
    hashes = {learned(make_config(f"train.dataset_path={tmp_path}", *COMPARED, *keys)) for keys in runs}
    assert len(hashes) == 3


def test_given_weights_change_nothing(tmp_path: Path, make_config: MakeConfig, compared: str, lean_run: Run) -> None:
    assert lean_run(tmp_path, *COMPARED) == 0
    files = {
        "student.pretrained_weights": tmp_path / "teacher_backbone.safetensors",
        "MODEL.WEIGHTS": tmp_path / "checkpoints" / "step_00000004",
    }
    assert set(files) == WEIGHTS_TO_START_FROM
    hashes = {learned(make_config(*COMPARED, f"{key}={file}")) for key, file in files.items()}
    assert len(hashes | {compared}) == 3


def test_a_key_that_teaches_nothing_changes_what_is_learned(
    tmp_path: Path, debug_run: Run, make_config: MakeConfig, compared: str
) -> None:
    others = [f"{key}={value}" for key, value in TEACHES_NOTHING.items()]
    assert debug_run(tmp_path, *COMPARED, *others) == 0
    assert sha256_of_tensors(load_file(tmp_path / "checkpoints" / "step_00000004" / "model.safetensors")) == compared
