"""What tests of every folder share: one thread, and configurations of the smallest run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.equi.families.registry import FAMILIES
from dinov2_equi.models.registry import ARCHS

DEBUG_CPU = Path(__file__).parents[1] / "configs" / "debug_cpu.yaml"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute on one thread: sums keep their order, and small tensors are faster."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def gradients_after_fork() -> None:
    """Let PyTorch count its devices now, while the CPU is the only one.

    Exports name further ones. Where those are found at the first backward pass, processes that are forked later, as
    those that stand in for ranks, refuse to compute gradients.
    """
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Return a function from `key=value` overrides to a validated configuration, by default on `debug_cpu.yaml`."""

    def make(*overrides: str, config_file: Path | None = DEBUG_CPU) -> Config:
        return load_config(
            config_file,
            overrides,
            archs=ARCHS,
            families=tuple(FAMILIES),
        )

    return make
