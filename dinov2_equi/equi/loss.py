"""Reconstruction loss: squared error of images or patches."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction_error(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each image drawn.

    Its mean over the S images is the reconstruction loss. With images in [0, 1] an error of 0.01 is 20 dB PSNR.
    Plainly::

        for k in range(S):
            error[k] = sum(weights[b, n] * ((predictions[k, b, n] - targets[k, b, n]) ** 2).mean()
                           for b, n in patches) / sum(weights)

    Args:
        predictions: [S, B, N, C] patches of C values in [0, 1].
        targets: the same shape.
        weights: [B, N] or [B, 1], non-negative; None counts all patches alike. Where all are 0, so is the error.

    Returns:
        [S] float32.

    Raises:
        ValueError: if the shapes differ.

    Source: Wang et al. (AAAI-26), Eq. 3, as a mean over pixels.
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions and targets must have one shape, got {list(predictions.shape)} "
            f"and {list(targets.shape)}; check the patch grid of the decoder"
        )
    squares = (predictions.float() - targets.float()).square()
    if weights is None:
        return squares.flatten(1).mean(dim=1)  # [S]
    patches = squares.mean(dim=-1)  # [S, B, N]
    weights = weights.to(patches.dtype).expand(patches.shape[1:])
    return (patches * weights).sum(dim=(1, 2)) / weights.sum().clamp_min(torch.finfo(patches.dtype).tiny)
