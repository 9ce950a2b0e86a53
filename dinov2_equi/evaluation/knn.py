"""Weighted k-nearest-neighbour classification of frozen features, DINOv2's training-free benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = TEMPERATURE,
    chunk_size: int = 512,
) -> dict[int, float]:
    """Return the top-1 accuracy in [0, 1] for each number of neighbours in `ks`.

    Features are L2-normalised; a test image's k most similar training images vote for their class with weight
    exp(cosine similarity / temperature). Of classes with equal votes the lowest label wins. The plain loop:

        for x, y in test:
            near = sorted(train, key=lambda t: -cos(x, t.x))[:k]
            votes[c] = sum(exp(cos(x, t.x) / temperature) for t in near if t.y == c)
            correct += argmax(votes) == y

    Args:
        train_features: [R, F], any float type, not necessarily normalised.
        train_labels: [R] integers >= 0.
        test_features: [n, F], on the device of `train_features`.
        test_labels: [n] integers >= 0; a class absent from the training labels is always wrong.
        ks: numbers of neighbours.
        temperature: softness of the votes; DINOv2 uses 0.07.
        chunk_size: test images compared at a time; bounds memory at chunk_size * R similarities.

    Raises:
        ValueError: for shapes that do not belong together, empty sets, or a k outside 1..R.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; the DINOv2 k-NN evaluation.
    """
    _check_sets(train_features, train_labels, test_features, test_labels)
    _check_neighbours(ks, len(train_features), temperature)
    train_labels, test_labels = train_labels.to(train_features.device), test_labels.to(train_features.device)
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    num_correct = dict.fromkeys(ks, 0)
    test_chunks, label_chunks = torch.split(test, chunk_size), torch.split(test_labels, chunk_size)
    for chunk, labels in zip(test_chunks, label_chunks, strict=True):
        similarities, nearest = (chunk @ train.T).topk(max(ks), dim=1)  # [b, max k] each, most similar first
        # Taking the largest off scales all votes of a row alike, so that no temperature makes them overflow or all 0.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()  # [b, max k]
        neighbour_labels = train_labels[nearest]  # [b, max k]
        for k in ks:
            votes = weights.new_zeros(len(chunk), num_classes)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            num_correct[k] += int((votes.argmax(dim=1) == labels).sum())
    return {k: correct / len(test) for k, correct in num_correct.items()}


def _check_sets(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(features) == 0:
            raise ValueError(
                f"expected {name} features [n, F] with labels [n] and n >= 1, got features {list(features.shape)} "
                f"and labels {list(labels.shape)}"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise ValueError(
                f"expected {name} labels to be integers >= 0, got {labels.dtype} from {labels.min().item()}"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features are {train_features.shape[1]} wide and test features {test_features.shape[1]}; "
            "take both from the same backbone"
        )


def _check_neighbours(ks: Sequence[int], num_train: int, temperature: float) -> None:
    bad = [k for k in ks if not 1 <= k <= num_train]
    if bad or not ks:
        raise ValueError(f"k must lie in 1..{num_train} (the number of training features), got {list(ks)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
