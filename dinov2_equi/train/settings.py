"""The configuration of a run, checked against the architectures and transform families that exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinov2_equi.config.load import load_config
from dinov2_equi.config.schema import Config
from dinov2_equi.equi.families.registry import FAMILIES
from dinov2_equi.models.registry import ARCHS


def load_run_config(config_files: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration; see `load_config`, which knows no registry itself.

    Raises:
        ConfigError: listing what is wrong.
    """
    return load_config(
        config_files,
        overrides,
        archs=ARCHS,
        families=tuple(FAMILIES),
    )


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the configuration files and the `key=value` overrides among words of a command line.

    A word that ends in `.yaml` or `.yml` is a file, unless it holds `=` and there is no such file. Whatever else it is,
    `load_config` judges it as an override.
    """
    files: list[Path] = []
    overrides: list[str] = []
    for word in words:
        is_file = word.endswith((".yaml", ".yml")) and ("=" not in word or Path(word).is_file())
        if is_file:
            files.append(Path(word))
        else:
            overrides.append(word)
    return files, overrides
