"""Reading files and overrides: order, types, and the text of every refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.config.keys import leaf_types, nearest_key, section_names
from dinov2_equi.config.load import WITHOUT_EFFECT, ConfigError, load_config, to_yaml
from dinov2_equi.config.schema import Config

Load = Callable[..., Config]


def message_of(load: Load, text: str | bytes | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- what is accepted


def test_nothing_given_yields_the_defaults(load: Load) -> None:
    assert load() == Config()


def test_override_beats_file_beats_default(load: Load) -> None:
    config = load("train:\n  seed: 1\n  num_workers: 3\n", "train.seed=2")
    assert (config.train.seed, config.train.num_workers, config.train.batch_size_per_gpu) == (2, 3, 64)


def test_last_of_two_overrides_wins(load: Load) -> None:
    assert load(None, "train.seed=1", "train.seed=5").train.seed == 5


def test_mixture_written_out_in_a_file_is_the_string_that_names_it(load: Load) -> None:
    config = load("train:\n  dataset_path:\n    mix:\n    - {path: a + b, weight: 3}\n    - {path: é, weight: 1}\n")
    assert config.train.dataset_path == 'mix:[{"path": "a + b", "weight": 3}, {"path": "é", "weight": 1}]'
    with pytest.raises(ConfigError, match=r"train\.dataset_path must be text"):
        load("train:\n  dataset_path: {mixture: []}\n")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "train:\n", "train:\n  # seed: 1\noptim:\n"])
def test_empty_file_or_section_changes_nothing(load: Load, text: str) -> None:
    assert load(text) == Config()


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("optim.base_lr=1e-3", "optim", "base_lr", 1e-3),  # plain YAML 1.1 reads 1e-3 as text
        ("optim.base_lr=1", "optim", "base_lr", 1.0),
        ("student.qkv_bias=false", "student", "qkv_bias", False),
        ("crops.global_crops_scale=[0.4, 1]", "crops", "global_crops_scale", [0.4, 1.0]),
        ("equi.family=se2", "equi", "family", "se2"),
        ("equi.family=null", "equi", "family", None),
        ("equi.family=", "equi", "family", None),
        ("equi.dim=null", "equi", "dim", None),
        ("equi.dim=8", "equi", "dim", 8),
        ("MODEL.WEIGHTS=", "MODEL", "WEIGHTS", ""),
        ("train.dataset_path=2024", "train", "dataset_path", "2024"),
        ("train.dataset_path=my pictures: #1 [a=b]", "train", "dataset_path", "my pictures: #1 [a=b]"),
        ("train.dataset_path=ImageNet:split=TRAIN:root=/x", "train", "dataset_path", "ImageNet:split=TRAIN:root=/x"),
    ],
)
def test_override_is_read_by_the_type_of_its_key(
    load: Load, override: str, section: str, name: str, expected: Any
) -> None:
    value = getattr(getattr(load(None, override), section), name)
    assert value == expected
    assert type(value) is type(expected)


def test_whole_number_in_a_file_becomes_float_where_a_float_is_wanted(load: Load) -> None:
    momentum = load("teacher:\n  final_momentum_teacher: 1\n").teacher.final_momentum_teacher
    assert type(momentum) is float


def test_reference_to_the_environment_is_resolved(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", "/pictures")
    assert load("train:\n  dataset_path: ${oc.env:PICTURES}/cats\n").train.dataset_path == "/pictures/cats"


def test_reference_to_another_list_is_resolved(load: Load) -> None:
    config = load("crops:\n  global_crops_scale: ${crops.local_crops_scale}\n")
    assert config.crops.global_crops_scale == [0.05, 0.32]


def test_resolved_yaml_loads_back_to_the_same_config(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    config = load(None, "equi.family=se2", "equi.loss_weight=0.5", "optim.min_lr=1e-7", "data.mean=[0,0,0]")
    assert load(to_yaml(config)) == config
    assert caplog.text == ""  # the resolved file of a run repeats every default; that is no reason to warn


# -------------------------------------------------------------------------------------------------- what is refused


def test_mistyped_key_in_a_file_names_file_key_value_and_the_nearest(load: Load) -> None:
    message = message_of(load, "train:\n  batchsize_per_gpu: 8\n")
    assert "given.yaml" in message
    assert "'train.batchsize_per_gpu' (value 8)" in message
    assert "did you mean 'train.batch_size_per_gpu'?" in message


def test_mistyped_override_names_the_command_line(load: Load) -> None:
    assert message_of(load, None, "optim.epoch=3") == (
        "command line: unknown key 'optim.epoch' (value '3'); did you mean 'optim.epochs'?"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch_size_per_gpu", "train.batch_size_per_gpu"),
        ("optim.batch_size_per_gpu", "train.batch_size_per_gpu"),
        ("model.weights", "MODEL.WEIGHTS"),
        ("train.official_epoch_length", "train.OFFICIAL_EPOCH_LENGTH"),
        ("student.patchsize", "student.patch_size"),
        ("equi.decodr.depth", "equi.decoder.depth"),
        ("equi.familly", "equi.family"),
        ("crop", "crops"),
        ("dino.head_nprototypes", "dino.head_n_prototypes"),
        ("ibot.head_nprototypes", "ibot.head_n_prototypes"),
        (
            "compute_precision.student.backbone.mixed_precision.param_type",
            "compute_precision.student.backbone.mixed_precision.param_dtype",
        ),
    ],
)
def test_nearest_key_over_the_full_path(typed: str, meant: str) -> None:
    assert nearest_key(typed) == meant


def test_each_key_with_one_letter_missing_is_recognised() -> None:
    keys = [*leaf_types(), *section_names()]
    wrong = {key: nearest_key(key[:-2] + key[-1]) for key in keys}
    assert {key: guess for key, guess in wrong.items() if guess != key} == {}


def test_key_close_to_nothing_lists_what_there_is(load: Load) -> None:
    assert "known here: MODEL, compute_precision, dino, ibot, vicreg, train," in message_of(load, "zzz: 1\n")


def test_dotted_key_in_a_file_is_told_to_nest(load: Load) -> None:
    assert "nested" in message_of(load, "train.seed: 1\n")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  seed: one\n", ["train.seed must be a whole number", "'one'"]),
        ("train:\n  seed: 1.5\n", ["train.seed must be a whole number", "1.5"]),
        ("train:\n  seed: true\n", ["train.seed must be a whole number", "True"]),
        ("train:\n  seed:\n", ["train.seed must be a whole number", "null"]),
        ("train:\n  seed: {a: 1}\n", ["train.seed must be a whole number", "{'a': 1}"]),
        ("optim:\n  base_lr: .nan\n", ["optim.base_lr must be a finite number", "nan"]),
        ("optim:\n  base_lr: -.inf\n", ["optim.base_lr must be a finite number", "-inf"]),
        ("student:\n  qkv_bias: 2\n", ["student.qkv_bias must be true or false", "2"]),
        ("crops:\n  global_crops_scale: 0.5\n", ["crops.global_crops_scale must be a list", "0.5"]),
        ("crops:\n  global_crops_scale: [[1]]\n", ["crops.global_crops_scale must be a list", "[[1]]"]),
        ("train:\n  dataset_path: 2024\n", ["train.dataset_path must be text", "2024", "quotes"]),
        ("train:\n  dataset_path: '???'\n", ["train.dataset_path must be text", "???"]),
        ("equi:\n  family: [se2]\n", ["equi.family must be text or null", "se2"]),
        ("equi: se2\n", ["'equi' is a section", "'se2'", "equi.family"]),
        ("train: [1]\n", ["'train' is a section", "[1]", "train.seed"]),
        ("train:\n  dataset_path: ${nothing.here}\n", ["train.dataset_path", "${nothing.here}", "cannot be resolved"]),
        ("train:\n  seed: ${train.seed}\n", ["train.seed", "cannot be resolved"]),
        ("train:\n  seed: ${train.dataset_path}\n", ["train.seed", "ImageNet"]),
        ("train:\n  dataset_path: '${'\n", ["train.dataset_path", "'${'"]),
    ],
)
def test_wrong_type_names_file_key_expectation_and_value(load: Load, text: str, parts: list[str]) -> None:
    message = message_of(load, text)
    assert [part for part in ["given.yaml", *parts] if part not in message] == []


@pytest.mark.parametrize("override", ["train.seed", "=1", "", "train.seed:1", " =", "--train.seed"])
def test_override_without_key_or_value_is_refused(load: Load, override: str) -> None:
    assert "key=value" in message_of(load, None, override)


@pytest.mark.parametrize("raw", ["", "one", "1.5", "[1", "{a: 1}", "null", "1: 2: 3", "9" * 400, "\t", "&a *a", "${"])
def test_override_of_a_number_with_something_else_names_the_key(load: Load, raw: str) -> None:
    assert "command line: train.seed" in message_of(load, None, f"train.seed={raw}")


def test_override_of_a_section_is_refused(load: Load) -> None:
    assert "'train' is a section" in message_of(load, None, "train=1")


@pytest.mark.parametrize(
    "content",
    [
        b"train:\n  seed: 1\n seed: 2\n",
        b"train:\n  seed: 1\n  seed: 2\n",
        b"a: b: c\n",
        b"\tseed: 1\n",
        b"- train\n",
        b"'unclosed\n",
        b"a: &a [*a]\n",
        b"!!python/object/apply:os.getcwd []\n",
        b"{null: 2}\n",
        b"? [a]\n: 2\n",
        b"\xff\xfe\x00",
        b"train: {seed: 1\n",
        b"42\n",
        b"[" * 5000,
        b"train: !!int x\n",
        b"train: !!timestamp x\n",  # PyYAML answers these three with errors of its own making
        b"train: {seed: !!bool x}\n",
        b"train: {seed: !!int ''}\n",
    ],
)
def test_file_that_is_no_yaml_mapping_is_refused_with_its_name(load: Load, content: bytes) -> None:
    assert "given.yaml" in message_of(load, content)


def test_missing_file_names_the_nearest_in_its_folder(tmp_path: Path, tables: dict[str, Any]) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"quikstart\.yaml: no such file; did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml", (), **tables)


def test_missing_file_in_a_missing_folder(tmp_path: Path, tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no such file; check --config-file"):
        load_config(tmp_path / "none" / "x.yaml", (), **tables)


def test_folder_given_as_file(tmp_path: Path, tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, (), **tables)


def test_all_mistakes_are_listed_at_once(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("train:\n  sed: 1\n  num_workers: x\n", "optim.lrr=3")
    assert caught.value.keys == ("train.sed", "train.num_workers", "optim.lrr")
    assert str(caught.value).startswith("3 problems in the configuration:\n  - ")


def test_range_error_says_where_the_value_was_set(load: Load) -> None:
    message = message_of(load, "optim:\n  epochs: 0\n", "train.batch_size_per_gpu=0")
    assert "given.yaml: optim.epochs must be at least 1, got 0" in message
    assert "command line: train.batch_size_per_gpu must be at least 1, got 0" in message


# ------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    "override",
    [
        "train.saveckp_freq=5",
        "train.cache_dataset=false",
        "optim.lr=0.1",
        "compute_precision.grad_scaler=false",
        "compute_precision.student.backbone.mixed_precision.buffer_dtype=bf16",
        "compute_precision.teacher.dino_head.mixed_precision.reduce_dtype=fp32",
    ],
)
def test_key_without_effect_warns_with_its_name_and_what_to_do(
    load: Load, override: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(None, override)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert override.partition("=")[0] in record.message
    assert "no effect" in record.message


def test_key_with_effect_does_not_warn(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load(None, "train.seed=3", "compute_precision.autocast=fp32", "optim.base_lr=0.1")
    assert caplog.text == ""


def test_keys_without_effect_are_keys_of_the_schema() -> None:
    assert set(WITHOUT_EFFECT) <= set(leaf_types()) | section_names()


# -------------------------------------------------------------------------------------------------- several files


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[Path]]:
    """Write texts to `first.yaml`, `second.yaml`, ... and return their paths."""

    def write(*texts: str) -> list[Path]:
        paths = [tmp_path / f"{name}.yaml" for name in ("first", "second", "third")[: len(texts)]]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return paths

    return write


Files = Callable[..., list[Path]]


def test_later_file_beats_earlier_and_override_beats_both(files: Files, tables: dict[str, Any]) -> None:
    paths = files("train: {seed: 1, num_workers: 1, num_threads: 1}", "train: {seed: 2, num_workers: 2}")
    train = load_config(paths, ["train.seed=3"], **tables).train
    assert (train.seed, train.num_workers, train.num_threads) == (3, 2, 1)


def test_order_of_the_files_decides(files: Files, tables: dict[str, Any]) -> None:
    paths = files("train: {seed: 1}", "train: {seed: 2}", "optim: {epochs: 12}")
    assert load_config(paths[::-1], (), **tables).train.seed == 1


def test_no_files_yield_the_defaults(tables: dict[str, Any]) -> None:
    assert load_config([], (), **tables) == load_config(None, (), **tables) == Config()


def test_null_in_a_later_file_takes_back_what_an_earlier_one_set(files: Files, tables: dict[str, Any]) -> None:
    paths = files("equi: {family: se2, loss_weight: 1.0}", "equi: {family: null, loss_weight: 0.0}")
    assert load_config(paths, (), **tables).equi.family is None


def test_section_of_a_later_file_leaves_the_other_keys_alone(files: Files, tables: dict[str, Any]) -> None:
    paths = files("equi:\n  family: se2\n  decoder:\n    depth: 3\n", "equi:\n  decoder:\n    mlp_ratio: 2.0\n")
    decoder = load_config(paths, (), **tables).equi.decoder
    assert (decoder.depth, decoder.mlp_ratio) == (3, 2.0)


def test_reference_sees_what_a_later_file_set(files: Files, tables: dict[str, Any]) -> None:
    paths = files("train: {num_workers: '${train.seed}'}", "train: {seed: 7}")
    assert load_config(paths, (), **tables).train.num_workers == 7


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("text", ["train: {sed: 1}", "train: {seed: x}", "train: {seed: -1}", "train: [", "- train"])
def test_fault_names_the_file_in_which_it_stands(files: Files, tables: dict[str, Any], wrong: int, text: str) -> None:
    texts = ["optim: {epochs: 12}", "optim: {epochs: 12}"]
    texts[wrong] = text
    with pytest.raises(ConfigError) as caught:
        load_config(files(*texts), (), **tables)
    message = str(caught.value)
    assert ("first.yaml" in message, "second.yaml" in message) == (wrong == 0, wrong == 1)


def test_wrong_value_is_blamed_on_the_file_that_set_it_last(files: Files, tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"second\.yaml: optim\.epochs must be at least 1, got 0") as caught:
        load_config(files("optim: {epochs: 12}", "optim: {epochs: 0}"), (), **tables)
    assert "first.yaml" not in str(caught.value)


def test_default_that_does_not_fit_the_files_names_them_all(files: Files, tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"first\.yaml \+ .*second\.yaml: optim\.warmup_epochs must not exceed"):
        load_config(files("optim: {epochs: 3}", "train: {seed: 1}"), (), **tables)


def test_missing_second_file_is_named(files: Files, tables: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"frist\.yaml: no such file; did you mean .*first\.yaml"):
        load_config([*files("train: {seed: 1}"), tmp_path / "frist.yaml"], (), **tables)


# --------------------------------------------------------------------------------- the baseline with the projection


def test_baseline_divides_the_features_without_a_transform(load: Load) -> None:
    assert load(None, "equi.split_without_transform=true", "equi.dim=8").equi.family is None


def test_baseline_with_a_transform_is_a_contradiction(load: Load) -> None:
    message = message_of(load, None, "equi.split_without_transform=true", "equi.family=se2")
    assert "equi.split_without_transform" in message
    assert "'se2'" in message


def test_width_of_a_divided_baseline_is_checked(load: Load) -> None:
    message = message_of(load, None, "equi.split_without_transform=true", "equi.dim=1024")
    assert "equi.dim must be below" in message
    assert load(None, "equi.dim=1024").equi.dim == 1024  # nothing is divided, so nothing can be too wide
