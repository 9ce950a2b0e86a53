"""Weighted k-nearest-neighbour classification of frozen features, DINOv2's training-free benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.evaluation.accepted_labels import is_right

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
    train_chunk_size: int = 65_536,
    devices: Sequence[torch.device | str] = (),
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
        test_features: [n, F].
        test_labels: [n] integers >= 0; a class absent from the training labels is always wrong. Or [n, C] bool, the
            classes that are accepted for each image, C those of the training labels.
        ks: numbers of neighbours.
        temperature: softness of the votes; DINOv2 uses 0.07.
        chunk_size: test images compared at a time.
        train_chunk_size: with so many training images; bounds memory at chunk_size * train_chunk_size similarities, and
            a float32 copy of so many training features.
        devices: each holds an equal share of the training features and finds the nearest in it, all at the same time;
            the first one counts the votes. None named: the device of `train_features`.

    Raises:
        ValueError: for shapes that do not belong together, empty sets, or a k outside 1..R.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; the DINOv2 k-NN evaluation.
    """
    _check_sets(train_features, train_labels, test_features, test_labels)
    _check_neighbours(ks, len(train_features), temperature)
    first, *others = [torch.device(name) for name in devices] or [train_features.device]
    parts = _parts(train_features, [first, *others])
    train_labels, test_labels = train_labels.to(first), test_labels.to(first)
    num_classes = int(train_labels.max()) + 1
    num_correct = dict.fromkeys(ks, 0)
    test_chunks, label_chunks = test_features.split(chunk_size), test_labels.split(chunk_size)
    for chunk, labels in zip(test_chunks, label_chunks, strict=True):
        similarities, nearest = _nearest_of_parts(chunk, parts, max(ks), train_chunk_size)  # [b, max k] each
        # Taking the largest off scales all votes of a row alike, so that no temperature makes them overflow or all 0.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()  # [b, max k]
        neighbour_labels = train_labels[nearest]  # [b, max k]
        for k in ks:
            votes = weights.new_zeros(len(chunk), num_classes)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            num_correct[k] += int(is_right(votes.argmax(dim=1), labels).sum())
    return {k: correct / len(test_features) for k, correct in num_correct.items()}


def _parts(train: Tensor, devices: Sequence[torch.device]) -> list[Tensor]:
    """Return the training features in as many parts as there are devices, in order; fewer where there are fewer."""
    return [
        part.to(device) for part, device in zip(train.tensor_split(len(devices)), devices, strict=True) if len(part)
    ]


def _nearest_of_parts(test: Tensor, parts: Sequence[Tensor], k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return what `_nearest` returns for all parts together, on the device of the first."""
    # First all devices are given their work, then the first one waits for the others.
    found = [_nearest(test.to(part.device), part, k, chunk_size) for part in parts]
    starts = accumulate((len(part) for part in parts[:-1]), initial=0)
    similarities = torch.cat([values.to(parts[0].device) for values, _ in found], dim=1)
    rows = torch.cat([r.to(parts[0].device) + start for (_, r), start in zip(found, starts, strict=True)], dim=1)
    return _largest(similarities, rows, k)


def _largest(similarities: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    similarities, order = similarities.topk(min(k, similarities.shape[1]), dim=1)
    return similarities, rows.gather(1, order)


def _nearest(test: Tensor, train: Tensor, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and rows of the k training features [R, F] nearest to each of [b, F]: [b, k] each.

    Most similar first. Training features are normalised chunk by chunk: there is no second copy of all of them.
    """
    test = F.normalize(test.float(), dim=1)
    similarities, rows = test.new_empty(len(test), 0), torch.empty(len(test), 0, dtype=torch.int64, device=test.device)
    for number, chunk in enumerate(train.split(chunk_size)):
        found = test @ F.normalize(chunk.float(), dim=1).T  # [b, chunk]
        values, places = found.topk(min(k, len(chunk)), dim=1)
        similarities = torch.cat([similarities, values], dim=1)
        rows = torch.cat([rows, places + number * chunk_size], dim=1)
        similarities, rows = _largest(similarities, rows, k)
    return similarities, rows


def _check_sets(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        is_plain = labels.ndim == 1 or name == "train"
        has_shapes = features.ndim == 2 and labels.ndim == (1 if is_plain else 2)
        if not has_shapes or labels.shape[:1] != features.shape[:1] or len(features) == 0:
            raise ValueError(
                f"expected {name} features [n, F] with labels [n] and n >= 1, got features {list(features.shape)} "
                f"and labels {list(labels.shape)}"
            )
        if not is_plain and (labels.dtype != torch.bool or labels.shape[1:] != (int(train_labels.max()) + 1,)):
            raise ValueError(
                f"expected accepted classes [n, {int(train_labels.max()) + 1}] bool, got {list(labels.shape)} of "
                f"{labels.dtype}"
            )
        if is_plain and (labels.is_floating_point() or int(labels.min()) < 0):
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
