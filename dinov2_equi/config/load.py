"""Configuration from defaults, YAML files and `key=value` overrides, in this order; the last one wins.

Whatever is wrong with the input ends in a `ConfigError` that names file, key and value.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_equi.config.errors import ConfigError, Problem
from dinov2_equi.config.keys import (
    has_type,
    is_optional,
    is_text,
    leaf_types,
    nearest,
    nearest_key,
    section_names,
    type_name,
)
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import ArchShape, find_problems, value_at

__all__ = ["ConfigError", "load_config", "to_yaml"]

logger = logging.getLogger(__name__)

_COMMAND_LINE = "command line"
_MISSING_VALUE = "???"  # OmegaConf's mark
_INTERPOLATION = "${"  # OmegaConf's references, such as ${oc.env:HOME}

WITHOUT_EFFECT: Mapping[str, str] = {
    "compute_precision.grad_scaler": "bf16 and fp32 need no loss scaling",
    **{
        f"compute_precision.{owner}.{name}.mixed_precision.buffer_dtype": "the networks have no buffers"
        for owner in ("teacher", "student")
        for name in ("backbone", "dino_head", "ibot_head")
    },
    **{
        f"compute_precision.teacher.{name}.mixed_precision.reduce_dtype": "the teacher has no gradients"
        for name in ("backbone", "dino_head", "ibot_head")
    },
    "train.saveckp_freq": "set train.checkpoint_every_steps",
    "train.cache_dataset": "DINOv2 does not read it either",
    "optim.lr": "set optim.base_lr; the learning rate is derived from it and the batch size",
}
"""Keys (or whole sections) of DINOv2 that are accepted and not read, with what to do instead."""


@dataclass(frozen=True)
class Setting:
    """One value set by the user, and where."""

    key: str
    value: Any
    source: str


def load_config(
    config_files: Path | Sequence[Path] | None,
    overrides: Sequence[str] = (),
    *,
    archs: Mapping[str, ArchShape],
    families: Collection[str],
) -> Config:
    """Return the validated configuration: defaults, then the files in their order, then the overrides.

    Args:
        config_files: YAML file with what differs from the defaults, or several, of which a later one states what
            differs from those before it; None for the defaults.
        overrides: `key=value` with a dotted key; the value is read as YAML, or taken as it is where the key holds text.
        archs: shape by architecture name.
        families: names of the transform families.

    Raises:
        ConfigError: for an unreadable file, unknown keys, wrong types, values out of range, and values that do not
            fit each other; the message lists all problems of the first of these kinds that occurs.
    """
    files = _as_sequence(config_files)
    settings, problems = _read_all(files, overrides)
    if problems:
        raise ConfigError(problems)
    config = _apply(settings)
    sources = {setting.key: setting.source for setting in settings}
    problems = find_problems(config, archs=archs, families=families)
    if problems:
        raise ConfigError([Problem(p.key, f"{_source_of(p.key, sources, files)}: {p.text}") for p in problems])
    _warn_of_keys_without_effect(config, sources)
    return config


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, in the order of the schema; `load_config` reads it back unchanged."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _as_sequence(config_files: Path | Sequence[Path] | None) -> Sequence[Path]:
    if config_files is None:
        return ()
    return (config_files,) if isinstance(config_files, Path) else config_files


def _read_all(config_files: Sequence[Path], overrides: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    found: list[Setting | Problem] = []
    for config_file in config_files:
        found += _walk(_read_yaml(config_file), "", str(config_file))
    for override in overrides:
        found.append(_parse_override(override))
    settings = [item for item in found if isinstance(item, Setting)]
    return settings, [item for item in found if isinstance(item, Problem)]


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        raise ConfigError([Problem("", f"{path}: {_why_unreadable(path, error)}")]) from error
    try:
        content = _parse_yaml(text)
    except Exception as error:  # PyYAML's constructors raise anything: AttributeError for `!!timestamp x`, for one
        reason = " ".join(str(error).split())
        raise ConfigError([Problem("", f"{path}: is not a valid YAML file: {reason}")]) from error
    if not isinstance(content, dict):
        text = f"{path}: must hold sections such as 'train:', got {type(content).__name__}"
        raise ConfigError([Problem("", text)])
    return content


def _parse_yaml(text: str) -> Any:
    """Return plain dicts, lists and scalars; references such as `${...}` stay as text."""
    # OmegaConf's loader: 1e-5 is a number, a key given twice is an error.
    loaded = OmegaConf.load(io.StringIO(text))
    return OmegaConf.to_container(loaded, resolve=False)


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, FileNotFoundError):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"cannot be read as a YAML file: {reason}"
    siblings = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    return "no such file" + (f"; did you mean {path.parent / guess}?" if guess else "; check --config-file")


def _walk(node: Mapping[Any, Any], prefix: str, source: str) -> Iterator[Setting | Problem]:
    """Yield the leaves of a mapping that match the schema, and a problem for each entry that does not."""
    leaves, sections = leaf_types(), section_names()
    for name, value in node.items():
        key = f"{prefix}{name}"
        if "." in str(name) or (key not in leaves and key not in sections):
            yield _unknown_key(key, value, source, prefix)
        elif key in leaves:
            yield _check_type(key, _mixture_as_text(key, value), source)
        elif isinstance(value, dict):
            yield from _walk(value, f"{key}.", source)
        elif value is not None:  # None: a section whose entries are all commented out
            yield _section_got_value(key, value, source)


def _mixture_as_text(key: str, value: Any) -> Any:
    """Return `mix:[...]` for a data set written out as a mapping `mix: [{path: ..., weight: ...}, ...]`."""
    is_mixture = key.endswith("dataset_path") and isinstance(value, dict) and set(value) == {"mix"}
    return f"mix:{json.dumps(value['mix'], ensure_ascii=False)}" if is_mixture else value


def _parse_override(override: str) -> Setting | Problem:
    key, equals, raw = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return Problem(key, f"{_COMMAND_LINE}: expected key=value, such as train.seed=1, got {override!r}")
    if key in section_names():
        return _section_got_value(key, raw, _COMMAND_LINE)
    hint = leaf_types().get(key)
    if hint is None:
        return _unknown_key(key, raw, _COMMAND_LINE, "")
    if is_text(hint):  # taken as it is: a path may hold anything
        is_null = is_optional(hint) and raw in ("", "null", "None")
        return _check_type(key, None if is_null else raw, _COMMAND_LINE)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
    except Exception:  # as in a file; whatever it was, it is not a value of this key
        return _wrong_type(key, raw, _COMMAND_LINE)
    assert isinstance(value, dict)
    return _check_type(key, value["value"], _COMMAND_LINE)


def _check_type(key: str, value: Any, source: str) -> Setting | Problem:
    if value == _MISSING_VALUE:
        return _wrong_type(key, value, source)
    if isinstance(value, str) and _INTERPOLATION in value:
        return Setting(key, value, source)  # its type shows when OmegaConf has resolved it
    hint = leaf_types()[key]
    return Setting(key, value, source) if has_type(value, hint) else _wrong_type(key, value, source)


def _apply(settings: Sequence[Setting]) -> Config:
    """Return the defaults with the settings on top; resolves references."""
    merged = OmegaConf.structured(Config)
    assert isinstance(merged, DictConfig)
    problems = []
    for setting in settings:
        try:
            OmegaConf.update(merged, setting.key, setting.value)
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(_unresolvable(setting, error))
    for setting in settings:
        problems += _resolve(merged, setting)
    if problems:
        raise ConfigError(problems)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _resolve(merged: DictConfig, setting: Setting) -> list[Problem]:
    """Replace a reference by what it stands for."""
    if not (isinstance(setting.value, str) and _INTERPOLATION in setting.value):
        return []
    try:
        resolved = OmegaConf.select(merged, setting.key)
        if OmegaConf.is_list(resolved):
            resolved = OmegaConf.to_container(resolved, resolve=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        return [_unresolvable(setting, error)]
    if not has_type(resolved, leaf_types()[setting.key]):
        return [_wrong_type(setting.key, resolved, setting.source)]
    OmegaConf.update(merged, setting.key, resolved)
    return []


def _unresolvable(setting: Setting, error: Exception) -> Problem:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    text = f"{setting.source}: {setting.key} = {_short(setting.value)} cannot be resolved: {reason}"
    return Problem(setting.key, text)


def _unknown_key(key: str, value: Any, source: str, prefix: str) -> Problem:
    guess = nearest_key(key)
    if guess == key:  # `train.seed: 1` in a file
        advice = "; write its sections as nested entries"
    elif guess is not None:
        advice = f"; did you mean '{guess}'?"
    else:
        advice = f"; known here: {', '.join(_names_in(prefix))}"
    return Problem(key, f"{source}: unknown key '{key}' (value {_short(value)}){advice}")


def _section_got_value(key: str, value: Any, source: str) -> Problem:
    names = ", ".join(f"{key}.{name}" for name in _names_in(f"{key}."))
    return Problem(key, f"{source}: '{key}' is a section and takes no value, got {_short(value)}; set one of {names}")


def _wrong_type(key: str, value: Any, source: str) -> Problem:
    wanted = type_name(leaf_types()[key])
    quotes = "; put it in quotes" if is_text(leaf_types()[key]) and isinstance(value, int | float) else ""
    arrived = "null" if value is None else f"{_short(value)} ({type(value).__name__})"
    return Problem(key, f"{source}: {key} must be {wanted}, got {arrived}{quotes}")


def _names_in(prefix: str) -> list[str]:
    """Return the names directly inside a section, in the order of the schema."""
    inside = (key[len(prefix) :].partition(".")[0] for key in leaf_types() if key.startswith(prefix))
    return list(dict.fromkeys(inside))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _source_of(key: str, sources: Mapping[str, str], config_files: Sequence[Path]) -> str:
    """Return where a value was set; for a default that does not fit the rest, the files with the rest."""
    return sources.get(key, " + ".join(map(str, config_files)) or "configuration")


def _warn_of_keys_without_effect(config: Config, sources: Mapping[str, str]) -> None:
    defaults = Config()
    for key, source in sources.items():
        advice = next((text for dead, text in WITHOUT_EFFECT.items() if f"{key}.".startswith(f"{dead}.")), None)
        if advice is not None and value_at(config, key) != value_at(defaults, key):
            logger.warning("%s: %s = %r has no effect here: %s", source, key, value_at(config, key), advice)
