"""Ways to run the same network faster or in less memory."""

from __future__ import annotations

import copy
import logging

import torch

from dinov2_equi.layers.block import Block
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

_PROBE_LAYOUT = ((2, 5),)  # two images of five tokens


def checkpoint_activations_(model: SSLMetaArch, *, keep_products: bool = False) -> None:
    """Let the student's backbone keep the input of each block alone (and products) for its backward pass."""
    for block in model.student["backbone"].block_list():  # type: ignore[operator]
        block.checkpointed, block.keep_products = True, keep_products


def compile_blocks_(model: SSLMetaArch, device: torch.device) -> bool:
    """Compile the blocks of student and teacher; return whether that works here. Names of parameters stay.

    A copy of one block is tried first, forward and backward: a compiler that fails must not end a training.
    """
    student, teacher = (network["backbone"].block_list() for network in (model.student, model.teacher))  # type: ignore[operator]
    probe = copy.deepcopy(student[0]).to_empty(device=device)
    problem = _problem_of_shapes(model) or _problem_of_compiling(probe, device)
    if problem:
        logger.warning("train.compile: blocks run uncompiled, as torch.compile fails here: %s", problem)
        return False
    for block in (*student, *teacher):
        block.compile(dynamic=False)
    logger.info("blocks are compiled at their first steps, which takes longer than the others")
    return True


def _problem_of_shapes(model: SSLMetaArch) -> str:
    """Return why blocks would be compiled again at every step, or an empty string."""
    cfg = model.cfg
    if cfg.train.gradient_accumulation_steps > 1 and cfg.student.drop_path_rate > 0:
        return (
            "with gradient accumulation each micro-batch drops another number of images; set student.drop_path_rate=0 "
            "or train.gradient_accumulation_steps=1"
        )
    return ""


def _problem_of_compiling(block: Block, device: torch.device) -> str:
    """Return what goes wrong when a block is compiled and run, or an empty string."""
    width = block.norm1.normalized_shape[0]
    x = torch.zeros(sum(images * tokens for images, tokens in _PROBE_LAYOUT), width, device=device, requires_grad=True)
    try:
        compiled = torch.compile(block, dynamic=False)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # stochastic depth draws
            torch.autograd.grad(compiled(x, _PROBE_LAYOUT).sum(), x)
    except Exception as error:  # whatever a foreign compiler raises means "do without"
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ""
