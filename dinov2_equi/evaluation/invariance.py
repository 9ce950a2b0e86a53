"""Do features stay where they are when the image is transformed? The counterpart of the regression probe.

A cosine similarity says little by itself: features with a large common mean are all alike, whatever the images. It is
therefore read against the similarity of different images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_similarity(features: Tensor, transformed: Tensor) -> float:
    """Return the mean cosine similarity between the features of images and of their transformed copies.

    Args:
        features: [n, F] of the images, n >= 1.
        transformed: [n, F] of their copies, in the same order.

    Raises:
        ValueError: if the two are not [n, F] of one shape.
    """
    if features.ndim != 2 or features.shape != transformed.shape or len(features) == 0:
        raise ValueError(
            f"expected features of images and of their copies of one shape [n, F], n >= 1, got {list(features.shape)} "
            f"and {list(transformed.shape)}"
        )
    return float(F.cosine_similarity(features.double(), transformed.double(), dim=1).mean())


def different_images_similarity(features: Tensor) -> float:
    """Return the mean cosine similarity over all pairs of different rows of [n, F], n >= 2.

    Raises:
        ValueError: if there is no pair.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features [n, F] of at least two images, got {list(features.shape)}")
    units = F.normalize(features.double(), dim=1)
    n = len(units)
    # The square of the sum holds every pair twice, and each row with itself once.
    every = units.sum(dim=0).square().sum() - torch.linalg.vector_norm(units, dim=1).square().sum()
    return float(every / (n * (n - 1)))
