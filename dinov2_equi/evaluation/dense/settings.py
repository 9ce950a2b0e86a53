"""Settings of a task from a YAML file and NAME=VALUE words, checked against a data class."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def read_settings(kind: type[T], path: Path | None, words: Sequence[str]) -> T:
    """Return a data class of settings: its defaults, changed by a file, changed by words.

    Args:
        kind: a data class whose fields are numbers, truth values, texts, or tuples of them.
        path: YAML with names and values; None: no file.
        words: `NAME=VALUE`, the value as in YAML.

    Raises:
        ValueError: an unknown name (with the nearest known one), or a value of another kind.
        OSError: the file cannot be read.
    """
    changes = read_mapping(path) if path is not None else {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise ValueError(f"expected NAME=VALUE, got {word!r}")
        changes[name] = yaml.safe_load(text)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _converted(name, value, defaults) for name, value in changes.items()})


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return what a YAML file of `NAME: VALUE` lines holds.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ValueError(f"expected {path} to hold NAME: VALUE lines, got {type(read).__name__}")
    return read


def _converted(name: str, value: Any, defaults: dict[str, Any]) -> Any:
    """Return a value in the kind of the default of its name."""
    if name not in defaults:
        near = difflib.get_close_matches(str(name), defaults, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no setting {name!r}; {hint}known: {', '.join(defaults)}")
    default = defaults[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, tuple):
        if not isinstance(value, list) or not value:
            raise ValueError(f"expected {name} to be a list like {list(default)}, got {value!r}")
        return tuple(_converted(name, item, {name: default[0]}) for item in value)
    if isinstance(default, (bool, str)):
        fits = isinstance(value, type(default))
    elif isinstance(default, int):
        fits = is_number and float(value).is_integer()
    else:
        value = _as_number(value)  # YAML reads 1e-4 as text
        fits = value is not None
    if not fits:
        raise ValueError(f"expected {name} to be like {default!r}, got {value!r}")
    return type(default)(value)


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
