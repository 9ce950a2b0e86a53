"""Hundreds of damaged configurations: each is refused with a ConfigError that names the key, never anything else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2_equi.config.keys import is_optional, is_text, leaf_types, section_names
from dinov2_equi.config.load import ConfigError, load_config, to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import CHOICES

SEED = 20_260
WRONG_FOR_ALL: list[Any] = [{"a": 1}, [[1.0]], ["x", None], {}]
WRONG_BY_TYPE: dict[Any, list[Any]] = {
    bool: [0, 1, 2, "yes please", None, 0.5],
    int: ["many", 1.5, True, None, float("inf"), 2**70],
    float: ["much", True, None, float("nan"), float("-inf"), "1,5"],
    str: [3, 2.5, True, None],
    list[float]: [None, 0.5, "x", ["x"], [True], [float("nan"), 1.0]],
    list[str]: [None, 0.5, "x", [1], [True], [["x"]]],
    int | None: ["many", 1.5, True, -float("inf")],
    str | None: [3, False, 1.5],
}


def out_of_range(key: str, hint: Any) -> list[Any]:
    if key in CHOICES or key in ("student.arch", "equi.family"):
        return ["", "no such word", "ViT\n", "é"]
    if key == "data.value_range":
        return [[1.0], [0.1, 0.1], [1.0, 0.0, 2.0]]  # empty: by the type of the image
    if hint is list[float]:
        return [[], [1.0], [0.9, 0.1] if not key.startswith("data.") else [0.1, 0.1], [0.1] * 7]
    return [-1, -(10**9)] if hint in (int, float, int | None) else []


def nested(key: str, value: Any) -> dict[str, Any]:
    node: Any = value
    for name in reversed(key.split(".")):
        node = {name: node}
    assert isinstance(node, dict)
    return node


def mistyped(key: str, rng: random.Random) -> str:
    """Return the key with a letter of its last name dropped, doubled, swapped or added; never another valid key."""
    section, dot, name = key.rpartition(".")
    valid = set(leaf_types()) | section_names()
    while True:
        at = rng.randrange(len(name))
        changed = rng.choice(
            [name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name[:at] + rng.choice("xyz_Q9") + name[at:]]
        )
        if changed and f"{section}{dot}{changed}" not in valid:
            return f"{section}{dot}{changed}"


def mutations() -> Iterator[tuple[str, str, Any]]:
    """Yield (kind, key, value): hundreds of single faults, every leaf with every kind."""
    rng = random.Random(SEED)
    for key, hint in leaf_types().items():
        yield "unknown key", mistyped(key, rng), 1
        for value in [*WRONG_BY_TYPE[hint], *WRONG_FOR_ALL]:
            if not (value == [] and hint is list[float]):
                yield "wrong type", key, value
        if out_of_range(key, hint):
            yield "out of range", key, rng.choice(out_of_range(key, hint))
    for key in section_names():
        yield "unknown key", mistyped(key, rng), {}
        for value in (0, "text", [1], True):
            yield "wrong type", key, value


CASES = list(mutations())


def refusal(path: Path | None, overrides: list[str], tables: dict[str, Any]) -> str | None:
    """Return the message of the ConfigError, or None when the configuration was accepted; lets all else through."""
    try:
        load_config(path, overrides, **tables)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["unknown key", "wrong type", "out of range"])
def test_damaged_file_is_refused_with_the_key(kind: str, tmp_path: Path, tables: dict[str, Any]) -> None:
    path = tmp_path / "damaged.yaml"
    cases = [(key, value) for case, key, value in CASES if case == kind]
    assert len(cases) > 80
    silent = []
    for key, value in cases:
        path.write_text(yaml.safe_dump(nested(key, value)))
        message = refusal(path, [], tables)
        if message is None or key not in message or "damaged.yaml" not in message:
            silent.append((key, value, message))
    assert silent == []


def test_damaged_override_is_refused_with_the_key(tables: dict[str, Any]) -> None:
    silent = []
    for _, key, value in random.Random(SEED).sample(CASES, 250):
        hint = leaf_types().get(key)
        if hint is not None and is_text(hint) and (key not in CHOICES or (value is None and is_optional(hint))):
            continue  # any text is a valid path or name as far as its type goes
        message = refusal(None, [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}"], tables)
        if message is None or key not in message:
            silent.append((key, value, message))
    assert silent == []


def test_whole_file_with_random_damage_never_raises_anything_else(tmp_path: Path, tables: dict[str, Any]) -> None:
    rng = random.Random(SEED)
    text = to_yaml(Config())
    path = tmp_path / "damaged.yaml"
    refused = 0
    for _ in range(80):
        at = rng.randrange(len(text))
        junk = rng.choice(
            [":", "\n", "[", "{", "'", '"', "&a ", "*a", "${", "!!", "\t", "- ", "#", "é", "|", ">", "%", "@"]
        )
        path.write_text(text[:at] + junk + text[at + rng.randrange(3) :], encoding="utf-8")
        refused += refusal(path, [], tables) is not None
    assert refused > 40  # the rest fell on values and comments that stay valid, such as a path
