"""J, F and mIoU against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.morphology import dilation, disk

from dinov2_equi.evaluation.mask_metrics import (
    VOID,
    ClassCounts,
    ObjectScores,
    boundary_measure,
    mask_boundary,
    region_similarity,
    summarise_objects,
)

SIZE = (37, 52)


def square(y: int, x: int, side: int = 12, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[max(y, 0) : y + side, max(x, 0) : x + side] = True
    return mask


def blobs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return dilation(rng.random(SIZE) > 0.98, disk(4))


EMPTY, FULL = np.zeros(SIZE, dtype=bool), np.ones(SIZE, dtype=bool)
PAIRS = {
    "equal": (square(5, 7), square(5, 7)),
    "shifted by one": (square(5, 8), square(5, 7)),
    "shifted by six": (square(11, 7), square(5, 7)),
    "apart": (square(1, 1), square(24, 39)),
    "at the border": (square(-4, 44), square(-2, 46)),
    "empty and something": (EMPTY, square(5, 7)),
    "something and empty": (square(5, 7), EMPTY),
    "both empty": (EMPTY, EMPTY),
    "full and something": (FULL, square(5, 7)),
    "both full": (FULL, FULL),
    "blobs": (blobs(0), blobs(1)),
}


def plain_jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = either = 0
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            both += bool(a[y, x] and b[y, x])
            either += bool(a[y, x] or b[y, x])
    return both / either if either else 1.0


def plain_boundary(mask: np.ndarray) -> np.ndarray:
    H, W = mask.shape
    boundary = np.zeros_like(mask)
    for y in range(H):
        for x in range(W):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            # Beyond the border lies what is at the border.
            boundary[y, x] = any(mask[min(v, H - 1), min(u, W - 1)] != mask[y, x] for v, u in others)
    return boundary


def plain_f(a: np.ndarray, b: np.ndarray, share: float = 0.008) -> float:
    """Precision and recall of the boundary by dilation with a disc, as the benchmark defines them."""
    radius = math.ceil(share * math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2))
    found, wanted = plain_boundary(a), plain_boundary(b)
    near_found, near_wanted = dilation(found, disk(radius)), dilation(wanted, disk(radius))
    if found.sum() == 0 and wanted.sum() == 0:
        return 1.0
    if found.sum() == 0 or wanted.sum() == 0:
        return 0.0
    precision, recall = (found & near_wanted).sum() / found.sum(), (wanted & near_found).sum() / wanted.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("name", PAIRS)
def test_region_similarity_differs_from_counting(name: str) -> None:
    a, b = PAIRS[name]
    assert region_similarity(a, b) == pytest.approx(plain_jaccard(a, b), abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("share", [0.008, 0.05])
def test_boundary_measure_differs_from_dilation(name: str, share: float) -> None:
    a, b = PAIRS[name]
    np.testing.assert_array_equal(mask_boundary(a), plain_boundary(a))
    assert boundary_measure(a, b, tolerance=share) == pytest.approx(plain_f(a, b, share), abs=1e-12)


def test_boundary_forgives_no_more_than_its_tolerance() -> None:
    truth = square(5, 7)
    assert boundary_measure(square(5, 8), truth) == 1.0  # 0.008 of the diagonal is rounded up to one pixel
    assert 0 < boundary_measure(square(7, 9), truth) < 0.5
    assert boundary_measure(square(7, 9), truth, tolerance=3) == 1.0


def test_void_pixels_count() -> None:
    truth = square(5, 7).astype(np.uint8)
    truth[:, 15:] = VOID
    predicted = square(5, 7).astype(np.uint8)
    predicted[:, 20:] = 1
    scores = ObjectScores()
    scores.add(predicted, truth, [1])
    assert scores.region[1] == [1.0] and scores.boundary[1] == [1.0]
    counts = ClassCounts()
    counts.add(predicted, truth)
    assert counts.intersection_over_union() == {0: 1.0, 1: 1.0}


def test_every_object_does_not_count_the_same() -> None:
    one, two = ObjectScores({1: [1.0, 1.0]}, {1: [0.5, 0.5]}), ObjectScores({1: [0.0], 2: [0.4]}, {1: [0.0], 2: [1.0]})
    numbers = summarise_objects([one, two])
    assert numbers["J"] == pytest.approx(1.4 / 3) and numbers["F"] == pytest.approx(0.5)
    assert numbers["J&F"] == pytest.approx((1.4 / 3 + 0.5) / 2)
    assert numbers["J recall"] == pytest.approx(1 / 3) and numbers["F recall"] == pytest.approx(1 / 3)  # above 0.5
    assert math.isnan(summarise_objects([])["J&F"])


def test_decay_is_not_first_less_last_quarter() -> None:
    falling = [1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.0]  # quarters of two steps: 0..2 and 6..8
    numbers = summarise_objects([ObjectScores({1: falling}, {1: falling[::-1]})])
    assert numbers["J decay"] == pytest.approx(2.9 / 3 - 0.7 / 3)
    assert numbers["F decay"] == pytest.approx(-numbers["J decay"])


def test_mean_iou_differs_from_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 5, (2, *SIZE)).astype(np.uint8) for _ in range(3)]
    frames[1][1][:4] = VOID
    confusion = np.zeros((6, 6))  # class 5 is nowhere: it is left out of the mean
    total = ClassCounts()
    for predicted, truth in frames:
        counts = ClassCounts()
        counts.add(predicted, truth)
        total.update(counts)
        for p, t in zip(predicted.ravel(), truth.ravel(), strict=True):
            if t != VOID:
                confusion[t, p] += 1
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    assert total.mean_intersection_over_union() == pytest.approx(np.mean(hits[:5] / union[:5]), abs=1e-12)


def test_a_class_that_is_missed_is_left_out_of_the_mean() -> None:
    counts = ClassCounts()
    truth = np.array([[0, 0, 3, 3]], dtype=np.uint8)
    counts.add(np.zeros_like(truth), truth)
    assert counts.intersection_over_union() == {0: 0.5, 3: 0.0}
    assert counts.mean_intersection_over_union() == 0.25
