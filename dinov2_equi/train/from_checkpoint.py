"""A model from a checkpoint alone: its settings lie beside its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dinov2_equi.config.schema import Config
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from dinov2_equi.fsdp.manifest import MANIFEST_NAME, CheckpointError
from dinov2_equi.models.weights import load_exact
from dinov2_equi.train.loop import CHECKPOINTS
from dinov2_equi.train.settings import load_run_config
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.whole import build_without_memory


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Return a checkpoint of a training, sharded or not; all tensors on the CPU.

    Args:
        path: a checkpoint's folder, the folder of several, or that of a run.
        step: which of several; None: the newest that is undamaged.

    Raises:
        CheckpointError: if there is none, it is damaged, or of another step.
        FileNotFoundError: if there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; give a run, or one of its checkpoints")
    if (path / MANIFEST_NAME).exists():
        checkpoint = read_checkpoint(path)
        if step not in (None, checkpoint.step):
            raise CheckpointError(f"{path} is the checkpoint of step {checkpoint.step}, not of step {step}")
        return checkpoint
    several = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    return CheckpointStore(several, read_only=True).load(step)


def model_of(checkpoint: Checkpoint) -> SSLMetaArch:
    """Return the model of a checkpoint on the CPU, in evaluation mode.

    Raises:
        CheckpointError: if it is none of a training.
        ValueError: if settings and weights do not belong together.
    """
    flat, weights = checkpoint.state.get("config"), checkpoint.tensors.get("model")
    if not isinstance(flat, dict) or weights is None:
        raise CheckpointError(f"{checkpoint.path} holds no settings or no model: it is no checkpoint of a training")
    model = build_without_memory(_config_of(flat, checkpoint.path)).to_empty(device=torch.device("cpu"))
    load_exact(model, weights)
    return model.eval()


def _config_of(flat: Mapping[str, Any], origin: Path) -> Config:
    """Return the configuration of dotted keys, validated as one of a file."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise CheckpointError(f"{origin} holds settings that are none: {key!r}")
        section[name] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(nested)), encoding="utf-8")
        try:
            return load_run_config(path)
        except ValueError as error:
            raise ValueError(f"the settings in {origin}: {str(error).replace(str(path), 'state.json')}") from error
