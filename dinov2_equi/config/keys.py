"""The keys of the schema: which there are, what type they take, which one a mistyped key meant."""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from typing import Any

from dinov2_equi.config.schema import Config

_LARGEST_INT = 2**63 - 1  # what torch, NumPy and JSON readers can hold


@functools.cache
def leaf_types() -> Mapping[str, Any]:
    """Return the type of every leaf by its dotted key, in the order of the schema."""
    return dict(_walk(Config, ""))


@functools.cache
def section_names() -> frozenset[str]:
    """Return the dotted key of every section: each proper prefix of a leaf's key."""
    parts = [key.split(".") for key in leaf_types()]
    return frozenset(".".join(names[:depth]) for names in parts for depth in range(1, len(names)))


def _walk(section: type, prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, hint in typing.get_type_hints(section).items():
        key = f"{prefix}{name}"
        leaves += _walk(hint, f"{key}.") if isinstance(hint, type) and is_dataclass(hint) else [(key, hint)]
    return leaves


def is_optional(hint: Any) -> bool:
    """Return whether a leaf of this type may be null."""
    return type(None) in typing.get_args(hint)


def type_name(hint: Any) -> str:
    """Return the type of a leaf in a user's words."""
    if is_optional(hint):
        return f"{type_name(_without_none(hint))} or null"
    if typing.get_origin(hint) is list:
        return f"a list, each entry {type_name(typing.get_args(hint)[0])}"
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[hint]


def has_type(value: object, hint: Any) -> bool:
    """Return whether a value read from YAML is of the type of a leaf.

    Stricter than OmegaConf, which takes 2 for true, true for "True", and any list for a list of numbers.
    """
    if is_optional(hint):
        return value is None or has_type(value, _without_none(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(has_type(entry, typing.get_args(hint)[0]) for entry in value)
    if hint is int:
        return _is_int(value)
    if hint is float:
        return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
    return type(value) is hint


def _is_int(value: object) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_INT  # type(): True is an int to isinstance


def is_text(hint: Any) -> bool:
    """Return whether a leaf of this type takes text (or null)."""
    return hint is str or (is_optional(hint) and _without_none(hint) is str)


def _without_none(hint: Any) -> Any:
    assert typing.get_origin(hint) in (types.UnionType, typing.Union)
    (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return inner


def nearest_key(key: str) -> str | None:
    """Return the leaf or section that a mistyped key most likely meant, or None when nothing is close.

    A name that is right but stands in the wrong section is found first, then spelling mistakes over the whole key.
    """
    known = {name.casefold(): name for name in [*leaf_types(), *sorted(section_names())]}
    wanted = key.casefold()
    if wanted in known:
        return known[wanted]
    last = wanted.rpartition(".")[2]
    same_name = [name for folded, name in known.items() if folded.rpartition(".")[2] == last]
    pool = {name.casefold(): name for name in same_name} or known
    matches = difflib.get_close_matches(wanted, pool, n=1, cutoff=0.0 if same_name else 0.6)
    return pool[matches[0]] if matches else None


def nearest(word: str, choices: Collection[str]) -> str | None:
    """Return the choice whose spelling is closest to `word`, or None when none is close."""
    folded = {choice.casefold(): choice for choice in choices}
    matches = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None
