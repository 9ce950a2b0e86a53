"""Retrieval of images of the same class by the similarity of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_average_precision(
    query_features: Tensor,
    query_labels: Tensor,
    gallery_features: Tensor,
    gallery_labels: Tensor,
    *,
    chunk_size: int = 256,
) -> float:
    """Return the mean over the queries of the average precision of the gallery, ranked by cosine similarity.

    For a query q with R relevant images (those of its class) in the gallery::

        AP(q) = sum(precision among the first i for each rank i that holds a relevant image) / R

    Queries without a relevant image are left out.

    Args:
        query_features: [n, F].
        query_labels: [n] integers.
        gallery_features: [R, F], on the device of the queries; other images than they.
        gallery_labels: [R].
        chunk_size: queries ranked at a time; bounds memory at a few times chunk_size * R numbers.

    Raises:
        ValueError: if no query has a relevant image.

    Source: the definition of trec_eval, as in scikit-learn's `average_precision_score`.
    """
    gallery = F.normalize(gallery_features.float(), dim=1)
    ranks = torch.arange(1, len(gallery) + 1, device=gallery.device)
    precisions = []
    for queries, labels in zip(query_features.split(chunk_size), query_labels.split(chunk_size), strict=True):
        order = (F.normalize(queries.float(), dim=1) @ gallery.T).argsort(dim=1, descending=True, stable=True)  # [b, R]
        is_relevant = gallery_labels[order] == labels[:, None]  # [b, R]
        found = is_relevant.cumsum(dim=1)
        sums = torch.where(is_relevant, found / ranks, 0.0).double().sum(dim=1)
        total = found[:, -1]
        precisions.append((sums / total)[total > 0])
    values = torch.cat(precisions)
    if not len(values):
        raise ValueError(
            "no query has an image of its class in the gallery; check that both sets have the same classes"
        )
    return float(values.mean())
