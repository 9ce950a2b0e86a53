"""Centring of the teacher's logits, shared by the DINO and the iBOT loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_equi.distributed.collectives import all_reduce_sum_


@torch.no_grad()
def centered_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return softmax((logits - center) / temperature) over the prototypes, in float32.

    Args:
        logits: [..., K]. Not changed.
        center: K numbers, in any shape.
        temperature: above 0.
    """
    return ((logits.float() - center.float().flatten()) / temperature).softmax(dim=-1)


@torch.no_grad()
def update_center_(center: Tensor, logits: Tensor, momentum: float) -> None:
    """Move `center` in place towards the mean of the logits of all ranks.

    Each row counts the same, whichever rank it is on; without any row the centre stays. Every rank must call it.

    Args:
        center: K numbers in any shape; becomes momentum * center + (1 - momentum) * mean.
        logits: [..., K], possibly without rows.
        momentum: in [0, 1].
    """
    rows = logits.float().flatten(0, -2)  # [R, K]
    # One collective for the sum and the number of rows.
    total = all_reduce_sum_(torch.cat((rows.sum(dim=0), rows.new_tensor([rows.shape[0]]))))  # [K + 1]
    num_rows = total[-1]
    mean = total[:-1] / num_rows.clamp_min(1.0)  # [K]
    updated = center * momentum + mean.view_as(center) * (1 - momentum)
    center.copy_(torch.where(num_rows > 0, updated, center))
