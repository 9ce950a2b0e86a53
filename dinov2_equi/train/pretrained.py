"""Start of a training from the weights of another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.equi.feature_split import RECORDED_BLOCK, RECORDED_DIM
from dinov2_equi.models.registry import ARCHS
from dinov2_equi.models.weights import load_exact, read_part, read_state_dict, rechunk_blocks, resample_positions
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)


def load_pretrained(model: SSLMetaArch, cfg: Config, path: Path) -> None:
    """Give student and teacher the weights in a file: ours, DINOv2's, or a backbone of timm or transformers.

    The backbone must be there and fit exactly, but for its position embedding, which is resampled to the crop size.
    Heads and the projection before the split are taken where the file has some of the same shapes; the others start
    from random weights. The log says which.

    Raises:
        ValueError: if the backbone does not fit; lists the differences.
        OSError: if there is no such file.
    """
    state = rechunk_blocks(read_state_dict(path), cfg.student.block_chunks, ARCHS[cfg.student.arch].depth)
    state = _with_fitting_positions(state, model.student["backbone"], path)
    for network in (model.student, model.teacher):
        load_exact(network["backbone"], state)
    for name in model.student:
        if name != "backbone":
            _load_part(model, name, path)


def _with_fitting_positions(state: dict[str, Tensor], backbone: Any, path: Path) -> dict[str, Tensor]:
    if "pos_embed" not in state or state["pos_embed"].shape[1] == backbone.pos_embed.shape[1]:
        return state
    grid = backbone.patch_embed.patches_resolution
    logger.info(
        "%s: position embedding resampled from %d patches to %d x %d", path, state["pos_embed"].shape[1] - 1, *grid
    )
    return resample_positions(state, grid)


def _load_part(model: SSLMetaArch, name: str, path: Path) -> None:
    """Load one part besides the backbone where the file has one of the same shapes."""
    wanted = _shapes(model.student[name].state_dict())
    part = {key: t for key, t in read_part(path, name).items() if key not in (RECORDED_DIM, RECORDED_BLOCK)}
    if not wanted:  # a split without projection
        return
    if _shapes(part) == wanted:
        for network in (model.student, model.teacher):
            load_exact(network[name], part)
        logger.info("%s: %s is taken as well", path, name)
    else:
        reason = "of other shapes" if part else "not in the file"
        logger.info("%s: %s is %s, it starts from random weights", path, name, reason)


def _shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}
