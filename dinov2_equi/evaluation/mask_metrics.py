"""How well predicted masks fit: region similarity J, boundary measure F, and intersection over union by class.

Index masks are uint8 [H, W], 0 the background, 255 (`VOID`) pixels that count for nobody.

Source: Perazzi et al., "A benchmark dataset and evaluation methodology for video object segmentation", CVPR 2016
(J and F, recall, decay); Pont-Tuset et al., arXiv 1704.00675 (several objects in a clip).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

VOID = 255
BOUNDARY_TOLERANCE = 0.008
"""Distance up to which two boundaries agree, as a share of the image's diagonal."""

_RECALL_THRESHOLD = 0.5
_DECAY_BINS = 4

Mask = NDArray[np.bool_]
IndexMask = NDArray[np.uint8]


def region_similarity(predicted: Mask, truth: Mask, void: Mask | None = None) -> float:
    """Return J, the intersection over union of two masks [H, W], in [0, 1]; 1 where both are empty.

    Args:
        predicted: of one object.
        truth: of the same object.
        void: [H, W], pixels that do not count.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def mask_boundary(mask: Mask) -> Mask:
    """Return the pixels [H, W] of a mask [H, W] whose right, lower or lower right neighbour is on the other side.

    The border of the image is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    boundary: Mask = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    return boundary


def boundary_measure(
    predicted: Mask, truth: Mask, void: Mask | None = None, tolerance: float = BOUNDARY_TOLERANCE
) -> float:
    """Return F, the harmonic mean of precision and recall of a mask's boundary pixels, in [0, 1].

    A boundary pixel is right where the other boundary is not farther away than `tolerance` of the diagonal, rounded up
    to whole pixels. Both boundaries empty: 1; one of them: 0.

    Args:
        predicted: [H, W], of one object.
        truth: [H, W], of the same object.
        void: [H, W], pixels that do not count.
        tolerance: a share of the diagonal, or a number of pixels from 1 on.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    reach = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    found, wanted = mask_boundary(predicted), mask_boundary(truth)
    if not found.any() or not wanted.any():
        return float(not found.any() and not wanted.any())
    around = _bounding_box(found | wanted)  # distances between boundaries need no more of the image
    found, wanted = found[around], wanted[around]
    precision = float((distance_transform_edt(~wanted)[found] <= reach).mean())
    recall = float((distance_transform_edt(~found)[wanted] <= reach).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


@dataclass
class ObjectScores:
    """J and F of the objects of a clip, in the order of its scored frames."""

    region: dict[int, list[float]] = field(default_factory=dict)
    """Object -> J of each scored frame."""

    boundary: dict[int, list[float]] = field(default_factory=dict)
    """Object -> F of each scored frame."""

    def add(self, predicted: IndexMask, truth: IndexMask, objects: Sequence[int]) -> None:
        """Score one frame.

        Args:
            predicted: index mask [H, W].
            truth: index mask [H, W], may hold `VOID`.
            objects: indices that are scored, those of the clip's first mask.
        """
        void = truth == VOID
        for number in objects:
            pair = (predicted == number, truth == number, void)
            self.region.setdefault(number, []).append(region_similarity(*pair))
            self.boundary.setdefault(number, []).append(boundary_measure(*pair))


def summarise_objects(clips: Sequence[ObjectScores]) -> dict[str, float]:
    """Return mean, recall and decay of J and F over all objects of clips, as the DAVIS benchmark counts them.

    Every object counts the same, whatever the number of its frames or of the objects beside it. Recall is the share of
    frames above 0.5, decay the mean of an object's first quarter of frames less that of its last quarter.

    Returns:
        `J&F`, then `J`, `J recall`, `J decay` and the same of `F`; NaN where there is no scored frame.
    """
    numbers: dict[str, float] = {}
    for name in ("J", "F"):
        values = [v for clip in clips for v in (clip.region if name == "J" else clip.boundary).values()]
        numbers[name] = _mean([float(np.mean(of_object)) for of_object in values])
        numbers[f"{name} recall"] = _mean([float(np.mean(np.array(v) > _RECALL_THRESHOLD)) for v in values])
        numbers[f"{name} decay"] = _mean([_decay(of_object) for of_object in values])
    return {"J&F": (numbers["J"] + numbers["F"]) / 2} | numbers


def _decay(values: Sequence[float]) -> float:
    """Return the mean of the first quarter less that of the last; quarters share the frame between them."""
    edges = np.floor(np.linspace(0, len(values) - 1, _DECAY_BINS + 1) + 0.5).astype(int)
    return float(np.mean(values[edges[0] : edges[1] + 1]) - np.mean(values[edges[-2] : edges[-1] + 1]))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


@dataclass
class ClassCounts:
    """Pixels by class, from which intersections over unions are made; counts of several clips can be added up."""

    both: dict[int, int] = field(default_factory=dict)
    """Class -> pixels where it is predicted and true."""

    predicted: dict[int, int] = field(default_factory=dict)
    true: dict[int, int] = field(default_factory=dict)

    def add(self, predicted: IndexMask, truth: IndexMask) -> None:
        """Count one frame; both [H, W], pixels where the truth is `VOID` are left out."""
        counted = truth != VOID
        predicted, truth = predicted[counted], truth[counted]
        for counts, pixels in (
            (self.both, truth[predicted == truth]),
            (self.predicted, predicted),
            (self.true, truth),
        ):
            _add_counts(counts, {k: int(n) for k, n in enumerate(np.bincount(pixels)) if n})

    def update(self, other: ClassCounts) -> None:
        """Add the counts of other frames."""
        _add_counts(self.both, other.both)
        _add_counts(self.predicted, other.predicted)
        _add_counts(self.true, other.true)

    def intersection_over_union(self) -> dict[int, float]:
        """Return class -> intersection over union in [0, 1], of the classes that are predicted or true somewhere."""
        classes = sorted(self.predicted.keys() | self.true.keys())
        both = {k: self.both.get(k, 0) for k in classes}
        return {k: both[k] / (self.predicted.get(k, 0) + self.true.get(k, 0) - both[k]) for k in classes}

    def mean_intersection_over_union(self) -> float:
        """Return the mean over classes in [0, 1], background included; NaN without any pixel."""
        return _mean(list(self.intersection_over_union().values()))


def _add_counts(counts: dict[int, int], more: Mapping[int, int]) -> None:
    for k, number in more.items():
        counts[k] = counts.get(k, 0) + number
