"""Errors on corrupted images, as ImageNet-C counts them: the mean corruption error, relative to AlexNet."""

from __future__ import annotations

from collections.abc import Mapping

from dinov2_equi.data.datasets.image_net_variants import SEVERITIES

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error of AlexNet over the five severities, of the fifteen corruptions that count."""

Errors = Mapping[str, Mapping[int, float]]
"""Corruption -> severity -> error in [0, 1]."""


def mean_error(errors: Errors) -> float:
    """Return the mean error in [0, 1] over the corruptions, of each its mean over the severities that are there."""
    means = [sum(of.values()) / len(of) for of in errors.values()]
    return sum(means) / len(means)


def mean_corruption_error(errors: Errors) -> float | None:
    """Return the mCE as a share of AlexNet's error (1: as bad as AlexNet), or None where images of it are missing.

    mCE = mean over the 15 corruptions c of sum_s E[c, s] / sum_s E_AlexNet[c, s], s the severities 1 to 5. Corruptions
    beyond the fifteen do not count. Only for the 1,000 classes of ImageNet is the number what others report.

    Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 4.1.
    """
    if any(set(errors.get(name, ())) != set(SEVERITIES) for name in ALEXNET_ERRORS):
        return None
    ratios = [sum(errors[name].values()) / len(SEVERITIES) / error for name, error in ALEXNET_ERRORS.items()]
    return sum(ratios) / len(ratios)
