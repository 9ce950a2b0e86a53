"""Reductions over all ranks; every function is the identity when no process group is initialised."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_equi.distributed.env import get_world_size, is_distributed


@torch.no_grad()
def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place and return it.

    Every rank must call it, with the same shape and dtype. No gradient flows through it.
    """
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over all ranks; the input keeps its values.

    Every rank must call it, with the same shape and dtype. No gradient flows through it. In a single process the
    result is the input itself.

    Args:
        tensor: floating point, any shape.
    """
    if not is_distributed():
        return tensor
    return all_reduce_sum_(tensor.detach().clone()) / get_world_size()
