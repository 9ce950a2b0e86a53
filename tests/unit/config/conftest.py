"""Fixtures of the configuration tests: the tables that the run layer passes in, and a loader for text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config


@dataclass(frozen=True)
class Shape:
    embed_dim: int
    depth: int
    num_heads: int


TABLES: dict[str, Any] = {
    "archs": {
        "vit_test_tiny": Shape(48, depth=3, num_heads=3),
        "vit_small": Shape(384, depth=12, num_heads=6),
        "vit_large": Shape(1024, depth=24, num_heads=16),
        "vit_giant2": Shape(1536, depth=40, num_heads=24),
    },
    "families": ["rotation", "se2", "color", "blur", "mixture"],
}


@pytest.fixture
def tables() -> dict[str, Any]:
    return TABLES


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Load a YAML text (or None, or bytes) and overrides."""

    def load_text(text: str | bytes | None = None, *overrides: str) -> Config:
        path = None
        if text is not None:
            path = tmp_path / "given.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides, **TABLES)

    return load_text
