"""Label propagation against a plain loop, and on clips whose answer is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.evaluation import label_propagation
from dinov2_equi.evaluation.label_propagation import (
    LabelledFrame,
    PropagationSettings,
    first_frame_labels,
    hard_labels,
    propagate,
    transfer_labels,
)

GRID = (4, 6)


def random_clip(frames: int, D: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(frames, D, *GRID, generator=generator))


def random_labels(C: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(C, *GRID, generator=generator).softmax(dim=0)


def plain_propagation(features: Sequence[Tensor], first: Tensor, settings: PropagationSettings) -> list[Tensor]:
    """Patch by patch, with every candidate in one list."""
    h, w = GRID
    is_filled = settings.protocol == "cropmae"
    labels = [first.double()]
    unit = [F.normalize(frame.double(), dim=0).permute(1, 2, 0).numpy() for frame in features]
    for t in range(1, len(features)):
        recent = [i for i in range(t - settings.context, t) if i >= 1]
        copies = settings.context - len(recent) if is_filled else 0
        context = [(0, not is_filled)] + [(0, True)] * copies + [(i, True) for i in recent]
        found = torch.zeros_like(labels[0])
        for y, x in itertools.product(range(h), range(w)):
            candidates = []
            for i, is_limited in context:
                for v, u in itertools.product(range(h), range(w)):
                    if is_limited and settings.radius and max(abs(v - y), abs(u - x)) > settings.radius:
                        continue
                    candidates.append((float(unit[t][y, x] @ unit[i][v, u]), labels[i][:, v, u]))
            best = sorted(candidates, key=lambda c: -c[0])[: settings.top_k]
            weights = [math.exp(score / settings.temperature) for score, _ in best]
            for weight, (_, label) in zip(weights, best, strict=True):
                found[:, y, x] += weight / sum(weights) * label
        labels.append(found)
    return labels


@pytest.mark.parametrize("protocol", label_propagation.PROTOCOLS)
@pytest.mark.parametrize(("radius", "context"), [(0, 3), (1, 2), (2, 0), (20, 4)])
def test_propagation_differs_from_a_plain_loop(protocol: str, radius: int, context: int) -> None:
    # Copies of the first frame tie: the loop and topk may then choose other ones, with the same labels.
    settings = PropagationSettings(top_k=4, radius=radius, temperature=0.3, context=context, protocol=protocol)
    clip = random_clip(4)
    found = list(propagate(clip, random_labels(), settings))
    for mine, plain in zip(found, plain_propagation(clip, random_labels(), settings), strict=True):
        torch.testing.assert_close(mine.double(), plain, atol=1e-5, rtol=0)  # float32 against float64


@pytest.mark.parametrize("max_scores", [1, 100, 400, 10**9])
@pytest.mark.parametrize("radius", [0, 1])
def test_labels_depend_on_how_the_work_is_cut(max_scores: int, radius: int) -> None:
    settings = PropagationSettings(top_k=5, radius=radius)
    maps = [F.normalize(frame, dim=0) for frame in random_clip(4)]
    context = [LabelledFrame(maps[0], random_labels(), is_limited=False), LabelledFrame(maps[1], random_labels())]
    whole = transfer_labels(maps[3], context, settings)
    torch.testing.assert_close(transfer_labels(maps[3], context, settings, max_scores=max_scores), whole)


def test_similarities_of_all_rows_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []
    nearest = label_propagation._nearest

    def recorded(target: Tensor, context: object, span: tuple[int, int], settings: PropagationSettings) -> object:
        spans.append(span)
        return nearest(target, context, span, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(label_propagation, "_nearest", recorded)
    frame = LabelledFrame(F.normalize(random_clip(1)[0], dim=0), random_labels())
    w = GRID[1]
    transfer_labels(frame.features, [frame], PropagationSettings(radius=1, top_k=2), max_scores=2 * w * 4 * w)
    assert spans == [(0, 2), (2, 4)]  # two rows see at most four rows of six


def test_only_the_first_and_the_last_frames_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def count(target: Tensor, context: Sequence[LabelledFrame], settings: PropagationSettings) -> Tensor:
        seen.append(len(context))
        return context[0].labels

    monkeypatch.setattr(label_propagation, "transfer_labels", count)
    list(propagate(random_clip(7), random_labels(), PropagationSettings(context=3)))
    assert seen == [1, 2, 3, 4, 4, 4]


def test_a_still_clip_does_not_keep_its_mask() -> None:
    mask = torch.zeros(16, 24, dtype=torch.uint8)
    mask[4:12, 8:16] = 3
    mask[12:16, 20:] = 7
    labels = first_frame_labels(mask, [0, 3, 7], GRID)
    still = [random_clip(1)[0]] * 6
    for soft in propagate(still, labels, PropagationSettings(top_k=1)):
        torch.testing.assert_close(soft, labels)
        hard = hard_labels(soft, [0, 3, 7], (16, 24))
        assert torch.equal(hard[2::4, 2::4], mask[2::4, 2::4])  # between the centres lies the interpolation


@pytest.mark.parametrize("protocol", label_propagation.PROTOCOLS)
def test_a_moving_square_is_lost(protocol: str) -> None:
    """Pixels are the features; a square of one colour moves two pixels a frame over a background of another."""
    H, W, side = 16, 26, 6
    clip, truth = [], []
    for t in range(7):
        mask = torch.zeros(H, W, dtype=torch.uint8)
        mask[3 + t : 3 + t + side, 2 + 2 * t : 2 + 2 * t + side] = 1
        clip.append(torch.where(mask.bool(), 1.0, -1.0)[None] * torch.tensor([1.0, 0.5])[:, None, None])
        truth.append(mask)
    settings = PropagationSettings(radius=6, context=5, protocol=protocol)
    labels = first_frame_labels(truth[0], [0, 1], (H, W), protocol)
    for soft, mask in zip(propagate(clip, labels, settings), truth, strict=True):
        assert torch.equal(hard_labels(soft, [0, 1], (H, W), protocol), mask)


def test_void_pixels_are_a_label() -> None:
    mask = torch.tensor([[0, 255], [1, 255]], dtype=torch.uint8)
    labels = first_frame_labels(mask, [0, 1], (2, 2))
    assert labels.tolist() == [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]


def test_stretching_does_not_help_a_weak_label() -> None:
    labels = torch.tensor([[[0.9, 0.7]], [[0.1, 0.3]]])  # two channels on a 1 x 2 grid
    assert hard_labels(labels, [0, 9], (1, 2)).tolist() == [[0, 9]]
    assert hard_labels(labels, [0, 9], (1, 2), "cropmae").tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "faulty", [{"top_k": 0}, {"radius": -1}, {"temperature": 0.0}, {"context": -1}, {"protocol": "sam"}]
)
def test_settings_out_of_range_are_accepted(faulty: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(faulty.values())))):
        PropagationSettings(**faulty).check()  # type: ignore[arg-type]


def test_frames_of_two_sizes_are_mixed() -> None:
    clip = [*random_clip(1), torch.randn(6, 4, 8)]
    with pytest.raises(ValueError, match=r"frame 1 on the grid \[4, 6\].*got \[4, 8\]"):
        list(propagate(clip, random_labels(), PropagationSettings()))


def test_nearest_label_is_not_that_of_the_middle_of_a_patch() -> None:
    mask = torch.from_numpy(np.arange(36, dtype=np.uint8).reshape(6, 6))
    labels = first_frame_labels(mask, list(range(36)), (2, 2))
    assert labels.argmax(dim=0).tolist() == [[7, 10], [25, 28]]  # rows 1 and 4, columns 1 and 4
