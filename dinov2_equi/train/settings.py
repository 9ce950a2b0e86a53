"""The configuration of a run, checked against the architectures and transform families that exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.equi.families import FAMILIES
from dinov2_equi.models.registry import ARCHS


def load_run_config(config_file: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration; see `load_config`, which knows no registry itself.

    Raises:
        ConfigError: listing what is wrong.
    """
    return load_config(
        config_file,
        overrides,
        arch_widths={name: arch.embed_dim for name, arch in ARCHS.items()},
        arch_heads={name: arch.num_heads for name, arch in ARCHS.items()},
        families=tuple(FAMILIES),
    )
