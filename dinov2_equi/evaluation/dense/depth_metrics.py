"""Losses and measures of predicted depth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2_equi.distributed.collectives import all_reduce_sum_, gather_values, sum_over_ranks

METRICS = ("rmse", "abs_rel", "sq_rel", "log10", "rmse_log", "silog", "delta1", "delta2", "delta3")
DELTA = 1.25
VARIANCE_FOCUS = 0.85
"""Share of the mean error that the scale-invariant loss forgives."""

_GRADIENT_STEPS = (1, 2, 4, 6)


def silog_loss(prediction: Tensor, truth: Tensor, known: Tensor, variance_focus: float = VARIANCE_FOCUS) -> Tensor:
    """Return the scale-invariant logarithmic loss sqrt(mean(g^2) - focus * mean(g)^2), g = log p - log t.

    The means, as those of the other losses, are over the pixels of all processes.

    Args:
        prediction: depth in metres, > 0, any shape.
        truth: of the same shape.
        known: bool of the same shape; pixels outside do not count. 0 where there is none inside.
        variance_focus: 1: a common factor costs nothing; 0: the RMSE of the logarithms.

    Source: Eigen et al. 2014 (arXiv 1406.2283), equation 4; the root as in Lee et al. 2019 (BTS, arXiv 1907.10326).
    """
    g = _log_error(prediction, truth, known)
    count = _count_over_ranks(known)
    mean, mean_square = sum_over_ranks(torch.stack([g.sum(), g.square().sum()])) / count
    # The gradient of the root is infinite at 0, where a prediction is perfect.
    loss: Tensor = (mean_square - variance_focus * mean.square()).clamp_min(1e-12).sqrt()
    return loss * (count >= 1)


def _log_error(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return log p - log t, 0 where it is not known."""
    return torch.where(known, prediction.log() - truth.where(known, 1.0).log(), 0.0)


def _count_over_ranks(known: Tensor) -> Tensor:
    """Return the number of known pixels of all processes, float32; next to nothing, and not 0, where there is none."""
    return all_reduce_sum_(known.sum()).float().clamp_min(1e-6)


def gradient_loss(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return by how much the slopes of log depth are wrong, on four scales: it sharpens edges.

    With g = log p - log t, every s-th row and column of it is taken, s = 1, 2, 4, 6; of that, the sum of |g(x + 2, y) -
    g(x, y)| and |g(x, y + 2) - g(x, y)| over the pairs of known pixels, divided by the number of known pixels; and the
    four added up.

    Args:
        prediction: [B, 1, H, W] metres, > 0.
        truth: [B, 1, H, W] metres.
        known: bool [B, 1, H, W]; 0 where no pixel is known.

    Source: the gradient term of Li and Snavely 2018 (MegaDepth, arXiv 1804.00607, section 4.1) with the scales and the
    distance of two pixels that DINOv2 (commit b8931f7) trains its depth heads with.
    """
    total = prediction.sum() * 0.0
    for step in _GRADIENT_STEPS:
        seen = known[..., ::step, ::step]
        g = _log_error(prediction[..., ::step, ::step], truth[..., ::step, ::step], seen)
        down = (g[..., 2:, :] - g[..., :-2, :]).abs() * (seen[..., 2:, :] & seen[..., :-2, :])
        right = (g[..., 2:] - g[..., :-2]).abs() * (seen[..., 2:] & seen[..., :-2])
        total = total + sum_over_ranks(down.sum() + right.sum()) / _count_over_ranks(seen)
    return total


def bins_loss(shares: Tensor, centres: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return the cross-entropy between shares of depth bins and the true depth, divided over its two nearest bins.

    The depth lies between two centres; each has the weight 1 - distance / spacing, so that the mean of the target's
    bins is the true depth.

    Args:
        shares: [B, K, H, W] in [0, 1], summing to 1 over the bins.
        centres: [K] metres, evenly spaced and ascending.
        truth: [B, 1, H, W] metres.
        known: bool [B, 1, H, W]; 0 where no pixel is known.
    """
    place = ((truth - centres[0]) / (centres[1] - centres[0])).clamp(0, len(centres) - 1)
    below = place.floor().long().clamp_max(len(centres) - 2)  # [B, 1, H, W]
    weight_above = place - below
    logs = shares.clamp_min(1e-8).log()
    cost = -(1 - weight_above) * logs.gather(1, below) - weight_above * logs.gather(1, below + 1)
    return sum_over_ranks((cost * known).sum()) / _count_over_ranks(known)


def depth_metrics(prediction: Tensor, truth: Tensor, measured: Tensor) -> dict[str, float]:
    """Return the measures of one image by the names in `METRICS`, over its measured pixels.

    Args:
        prediction: [H, W] metres, > 0.
        truth: [H, W] metres, > 0 where measured.
        measured: bool [H, W].

    Returns:
        rmse in metres; abs_rel = mean(|p - t| / t); sq_rel = mean((p - t)^2 / t) in metres; log10 = mean |log10 p -
        log10 t|; rmse_log; silog = 100 times the standard deviation of log p - log t; delta1 to 3 = share of pixels
        with max(p / t, t / p) below 1.25, 1.25^2, 1.25^3.

    Raises:
        ValueError: no pixel is measured.

    Source: Eigen et al. 2014 (arXiv 1406.2283); silog as in the KITTI benchmark.
    """
    if not measured.any():
        raise ValueError("expected at least one pixel of known depth in range and inside the crop, got none")
    p, t = prediction[measured].double(), truth[measured].double()
    logs = p.log() - t.log()
    ratio = torch.maximum(p / t, t / p)
    found = {
        "rmse": (p - t).square().mean().sqrt(),
        "abs_rel": ((p - t).abs() / t).mean(),
        "sq_rel": ((p - t).square() / t).mean(),
        "log10": logs.abs().mean() / math.log(10),
        "rmse_log": logs.square().mean().sqrt(),
        "silog": 100 * (logs.square().mean() - logs.mean().square()).clamp_min(0).sqrt(),
    }
    found |= {f"delta{power}": (ratio < DELTA**power).double().mean() for power in (1, 2, 3)}
    return {name: float(value) for name, value in found.items()}


class MeanOfImages:
    """The mean of measures over images: each image counts the same, however many of its pixels are measured.

    Args:
        first_image: path of the first one, for the error.
    """

    def __init__(self, first_image: str) -> None:
        self._first_image = first_image
        self._found: list[dict[str, float]] = []

    def add(self, found: Mapping[str, float]) -> None:
        """Count the measures of one more image."""
        self._found.append(dict(found))

    def result(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Return the means over the images of all processes, and `num_images`.

        Every process of a group must call it.

        Args:
            device: where the process group communicates.

        Raises:
            ValueError: no image was counted.
        """
        images = [found for share in gather_values(self._found, device) for found in share]
        if not images:
            raise ValueError(
                f"expected images to measure with known depth, got none, {self._first_image} the first of them; look "
                "at the depth maps, units_per_metre, max_depth and crop"
            )
        means = {name: math.fsum(found[name] for found in images) / len(images) for name in METRICS}
        return means | {"num_images": len(images)}
