"""What all parity tests share: where the reference tensors are, and how to read them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

REFERENCE = Path(__file__).parent / "reference"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def official_outputs_dir() -> Path:
    """Return the folder of the official ViT-S/14 outputs; they hold photographs that may not be redistributed."""
    folder = Path(os.environ.get("DINOV2_EQUI_PARITY_DATA", REPOSITORY.parent / "shared" / "data" / "parity"))
    if not folder.is_dir():
        pytest.skip(f"no official ViT-S/14 outputs in {folder}; set DINOV2_EQUI_PARITY_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def load_reference() -> Callable[[str], Any]:
    """Return a function that reads a `.pt` or `.json` file of reference values."""

    def load(name: str) -> Any:
        path = REFERENCE / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, weights_only=True)

    return load
