"""Figures that tell how the branch is doing; detached, for logs."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1] from their mean squared error [...]."""
    return -10 * torch.log10(mean_squared_error.clamp_min(1e-10))


def reconstruction_metrics(step_errors: Tensor) -> dict[str, Tensor]:
    """Return `equi/error_step_k` and `equi/psnr_step_k`, k = 1..S, from the errors [S] of the path steps."""
    errors = step_errors.detach()
    named = {f"equi/error_step_{k}": error for k, error in enumerate(errors, start=1)}
    named |= {f"equi/psnr_step_{k}": psnr(error) for k, error in enumerate(errors, start=1)}
    return named
