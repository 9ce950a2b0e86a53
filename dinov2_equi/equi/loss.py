"""Reconstruction loss of the images between the views."""

from __future__ import annotations

from torch import Tensor


def reconstruction_error(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of each path step, over images, channels and all pixels.

    Its mean over the steps is the reconstruction loss. With images in [0, 1] an error of 0.01 is 20 dB PSNR. Plainly:

        for k in range(S):
            error[k] = ((reconstructions[k] - targets[k]) ** 2).mean()

    Args:
        reconstructions: [S, B, 3, H, W] in [0, 1].
        targets: the same shape.

    Returns:
        [S] float32.

    Raises:
        ValueError: if the shapes differ.

    Source: Wang et al. (AAAI-26), Eq. 3, as a mean over pixels.
    """
    if reconstructions.shape != targets.shape:
        raise ValueError(
            f"reconstructions and targets must have one shape, got {list(reconstructions.shape)} "
            f"and {list(targets.shape)}; check the patch grid of the decoder"
        )
    return (reconstructions.float() - targets.float()).square().flatten(1).mean(dim=1)  # [S]
