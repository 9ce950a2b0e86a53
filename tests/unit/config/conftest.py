"""Fixtures of the configuration tests: the tables that the run layer passes in, and a loader for text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config

TABLES: dict[str, Any] = {
    "arch_widths": {"vit_test_tiny": 48, "vit_small": 384, "vit_large": 1024, "vit_giant2": 1536},
    "arch_heads": {"vit_test_tiny": 3, "vit_small": 6, "vit_large": 16, "vit_giant2": 24},
    "families": ["rotation", "se2"],
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
