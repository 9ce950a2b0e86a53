"""Figures that tell how the branch is doing; detached, for logs."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1] from their mean squared error [...]."""
    return -10 * torch.log10(mean_squared_error.clamp_min(1e-10))


def reconstruction_metrics(step_errors: Tensor) -> dict[str, Tensor]:
    """Return `equi/error_step_k` and `equi/psnr_step_k`, k = 1..S, from the errors [S] of the path steps."""
    errors = step_errors.detach()
    named = {f"equi/error_step_{k}": error for k, error in enumerate(errors, start=1)}
    named |= {f"equi/psnr_step_{k}": psnr(error) for k, error in enumerate(errors, start=1)}
    return named


def feature_metrics(invariant: Tensor, equivariant: Tensor) -> dict[str, Tensor]:
    """Return how the two parts of the tokens are used.

    * `equi/variance_share`: variance of the equivariant channels over that of all channels, in [0, 1];
    * `equi/rank_invariant`, `equi/rank_equivariant`: effective rank, between 1 and the width of the part.

    Args:
        invariant: [R, D_inv] tokens, R >= 2.
        equivariant: [R, D_equi] tokens.
    """
    spectra = [_spectrum(part.detach()) for part in (invariant, equivariant)]
    variances = [spectrum.sum() for spectrum in spectra]
    return {
        "equi/variance_share": variances[1] / (variances[0] + variances[1]).clamp_min(_TINY),
        "equi/rank_invariant": effective_rank(spectra[0]),
        "equi/rank_equivariant": effective_rank(spectra[1]),
    }


def effective_rank(spectrum: Tensor) -> Tensor:
    """Return the exponential of the entropy of a spectrum [D] of variances, a scalar in [1, D].

    Source: Roy and Vetterli, "The effective rank", 2007, with eigenvalues of the covariance as the distribution.
    """
    shares = spectrum / spectrum.sum().clamp_min(_TINY)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def _spectrum(tokens: Tensor) -> Tensor:
    """Return the eigenvalues [D] of the covariance of tokens [R, D], none below 0; NaN where a token is not finite."""
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        centred = tokens.float() - tokens.float().mean(dim=0)
        covariance = centred.T @ centred / len(tokens)
        if not covariance.isfinite().all():  # the routine would raise; the step has to say which figures are broken
            return torch.full_like(covariance[0], torch.nan)
        eigenvalues: Tensor = torch.linalg.eigvalsh(covariance)
    return eigenvalues.clamp_min(0.0)


def gradient_ratio(loss: Tensor, other: Tensor, features: list[Tensor]) -> Tensor:
    """Return the norm of the gradient of `loss` at the features over that of `other`; 0 / 0 counts as 0.

    Two more backward passes from the losses to `features`, and no further; the graph is kept.
    """
    norms = []
    for term in (loss, other):
        gradients = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)
        norms.append(
            torch.stack([g.float().square().sum() for g in gradients if g is not None] or [loss.new_zeros(())])
        )
    numerator, denominator = (parts.sum().sqrt() for parts in norms)
    return numerator / denominator.clamp_min(_TINY)
