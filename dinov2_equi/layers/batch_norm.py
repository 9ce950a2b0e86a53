"""Batch norm whose batch is that of all ranks, by default without running statistics: most heads are thrown away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_equi.distributed.collectives import sum_over_ranks
from dinov2_equi.distributed.env import get_world_size, is_distributed


class BatchNorm1d(nn.BatchNorm1d):
    """Batch norm of [B, C]; in training over the images of all ranks."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C] with each channel normalised."""
        return _over_ranks(self, x) if self.training and is_distributed() else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B, C, H, W]; in training over the images of all ranks.

    Args:
        num_channels: C.
        has_running_stats: Keep the mean and variance that are used in evaluation, as torch's does.
    """

    def __init__(self, num_channels: int, *, has_running_stats: bool = False) -> None:
        super().__init__(num_channels, track_running_stats=has_running_stats)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, H, W] with each channel normalised."""
        return _over_ranks(self, x) if self.training and is_distributed() else super().forward(x)


def _over_ranks(norm: BatchNorm1d | BatchNorm2d, x: Tensor) -> Tensor:
    """Return x [B, C, ...] normalised by mean and variance over all ranks, each of which has as many images."""
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = x.numel() // x.shape[1] * get_world_size()
    mean = sum_over_ranks(x.float().sum(axes)) / count  # [C]
    centred = x.float() - mean.view(shape)
    variance = sum_over_ranks(centred.square().sum(axes)) / count
    if norm.running_mean is not None:
        _keep(norm, mean, variance * (count / (count - 1)))
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (centred * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)


@torch.no_grad()
def _keep(norm: BatchNorm1d | BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of a batch, as torch's batch norm does."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)
