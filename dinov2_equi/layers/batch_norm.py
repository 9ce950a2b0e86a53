"""Batch norm whose batch is that of all ranks, without running statistics: its heads are trained and thrown away."""

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
    """Batch norm of [B, C, H, W]; in training over the images of all ranks."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, track_running_stats=False)

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
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (centred * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)
