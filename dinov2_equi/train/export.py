"""The teacher as files that others read: DINOv2's layout, and safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_equi.equi.feature_split import FeatureSplit, split_record
from dinov2_equi.models.registry import ARCHS
from dinov2_equi.models.weights import rechunk_blocks
from dinov2_equi.train.build_model import equi_block
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

SPLIT = "feature_split"
TEACHER_FILE = "teacher_checkpoint.pth"
BACKBONE_FILE = "teacher_backbone.safetensors"
BRANCH_FILE = "equi_branch.safetensors"


def export_teacher(model: SSLMetaArch, folder: Path) -> None:
    """Write the teacher, and the branch beside it.

    * `teacher_checkpoint.pth`: `{"teacher": {"backbone.*", "dino_head.*", ...}}`, as DINOv2 writes it; with the branch
      also `feature_split.*`, which says how the features are divided.
    * `teacher_backbone.safetensors`: the backbone alone, keys of the released weights.
    * `equi_branch.safetensors`: what reconstructs, where something does.

    Each file is written under a temporary name and renamed, so that a reader never sees half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher = {name: tensor.detach().cpu().contiguous() for name, tensor in model.teacher.state_dict().items()}
    teacher |= _split_record(model)
    pending = folder / f".{TEACHER_FILE}.tmp"
    torch.save({"teacher": teacher}, pending)
    pending.replace(folder / TEACHER_FILE)
    backbone = {k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")}
    flat = rechunk_blocks(backbone, 0, ARCHS[model.cfg.student.arch].depth)
    _write_safetensors(flat, folder / BACKBONE_FILE)
    if model.equi is not None and model.equi.objective is not None:
        decoder = {name: tensor.detach().cpu().contiguous() for name, tensor in model.equi.state_dict().items()}
        _write_safetensors(decoder, folder / BRANCH_FILE)


def _split_record(model: SSLMetaArch) -> dict[str, Tensor]:
    """Return how the teacher's features are divided, as tensors by their names in the file; empty if they are not."""
    if SPLIT not in model.teacher:
        return {}
    split = model.teacher[SPLIT]
    assert isinstance(split, FeatureSplit)
    record = split_record(split, equi_block(model.cfg))
    return {f"{SPLIT}.{name}": tensor.detach().cpu().contiguous() for name, tensor in record.items()}


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    pending = path.with_name(f".{path.name}.tmp")
    save_file(tensors, pending)
    pending.replace(path)
