"""Sinkhorn-Knopp assignment of samples to prototypes, used as the teacher's targets."""

from __future__ import annotations

import torch
import torch.distributed as dist  # noqa: TID251 - the only maximum over ranks in the package
from torch import Tensor

from dinov2_equi.distributed.collectives import all_reduce_sum_
from dinov2_equi.distributed.env import is_distributed


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Return soft assignments in which all prototypes are used about equally.

    The plain form, over the rows of all ranks together::

        Q = exp(logits / temperature)
        repeat n_iterations: divide each column of Q by its sum, then each row by its sum

    Here the first round works with logarithms, so that no exponential overflows and no sum can underflow to zero; the
    following rounds start from numbers that are safely within range. The result is the same.

    Every rank must call it, also one without rows.

    Args:
        logits: [R, K], R samples of this rank (0 is allowed), K prototypes. Not changed.
        temperature: above 0; smaller is sharper.
        n_iterations: at least 1.

    Returns:
        [R, K] float32; each row sums to 1.

    Raises:
        ValueError: if an argument is out of range.

    Source: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al. 2020,
    section 3.1.
    """
    if logits.ndim != 2 or temperature <= 0 or n_iterations < 1:
        raise ValueError(
            "expected logits [R, K], temperature > 0 and n_iterations >= 1, "
            f"got {list(logits.shape)}, {temperature}, {n_iterations}"
        )
    scores = logits.float() / temperature  # [R, K]
    scores = scores - _column_log_sums(scores)
    assignments = scores.softmax(dim=1)
    for _ in range(n_iterations - 1):
        assignments = assignments / all_reduce_sum_(assignments.sum(dim=0, keepdim=True))
        assignments = assignments / assignments.sum(dim=1, keepdim=True)
    return assignments


def _column_log_sums(scores: Tensor) -> Tensor:
    """Return log(sum(exp(scores))) over the rows of all ranks, [1, K]."""
    maxima = scores.new_full((1, scores.shape[1]), -torch.inf)
    if scores.shape[0] > 0:
        maxima = scores.amax(dim=0, keepdim=True)
    if is_distributed():
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    sums = all_reduce_sum_((scores - maxima).exp().sum(dim=0, keepdim=True))
    return maxima + sums.log()
