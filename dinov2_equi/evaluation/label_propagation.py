"""Carrying the labels of a clip's first frame through the clip by the likeness of frozen patch features.

Each patch of a frame takes the labels of the patches that are most alike among the frames before it. Nothing is
trained.

Source: Jabri et al., "Space-time correspondence as a contrastive random walk", NeurIPS 2020; Caron et al. (DINO), arXiv
2104.14294, section 4.2; the numbers of Eymael et al. (CropMAE), arXiv 2403.17823.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PROTOCOLS = ("dino", "cropmae")

_MAX_SCORES = 2**24
"""Similarities held at a time, 64 MiB: what bounds the memory, whatever the length of the clip or its frames."""


@dataclass(frozen=True)
class PropagationSettings:
    """How labels are carried on.

    Attributes:
        top_k: most similar patches that a patch takes its label from.
        radius: largest distance of these, along each axis, patches; 0: no limit.
        temperature: divides the cosine similarity before the softmax over the top k.
        context: frames before the present one that are looked at, besides the first.
        protocol: `dino`: at the start there are fewer frames, the radius holds for the first frame too, and the scores
            of each label are stretched to [0, 1] before the largest wins. `cropmae`: missing frames are copies of the
            first, which is searched everywhere, and the scores stay as they are.
    """

    top_k: int = 7
    radius: int = 20
    temperature: float = 0.7
    context: int = 20
    protocol: str = "dino"

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.top_k < 1 or self.radius < 0 or self.temperature <= 0 or self.context < 0:
            raise ValueError(
                "expected top_k >= 1, radius >= 0, temperature > 0 and context >= 0, got "
                f"{self.top_k}, {self.radius}, {self.temperature}, {self.context}"
            )
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {self.protocol!r}")


@dataclass(frozen=True)
class LabelledFrame:
    """A frame whose labels are known or were found."""

    features: Tensor
    """[D, h, w] of unit length."""

    labels: Tensor
    """[C, h, w] weights of each label."""

    is_limited: bool = True
    """Whether the radius holds for it."""


class LabelPropagation:
    """Carries labels from frame to frame, and keeps only the first frame and the last `settings.context` ones.

    Args:
        first_labels: [C, h, w] float32, weights of each label in the first frame's patches; 0 everywhere in a patch
            without any label.
        settings: how labels are carried on.

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(self, first_labels: Tensor, settings: PropagationSettings) -> None:
        settings.check()
        self._first_labels = first_labels
        self._settings = settings
        self._first: LabelledFrame | None = None
        self._taken = 0
        self._recent: deque[LabelledFrame] = deque(maxlen=settings.context)

    def next(self, features: Tensor, known: Tensor | None = None) -> Tensor:
        """Return the soft labels [C, h, w] of the next frame of the clip; of the first one those that are given.

        Args:
            features: [D, h, w], need not be of unit length.
            known: labels that this frame was given before; they are not looked for again.

        Raises:
            ValueError: for a frame of another grid than the first labels.
        """
        unit = F.normalize(features.float(), dim=0)
        grid = list(self._first_labels.shape[1:])
        if list(unit.shape[1:]) != grid:
            raise ValueError(
                f"expected features of frame {self._taken} on the grid {grid} of the first labels, got "
                f"{list(unit.shape[1:])}; all frames of a clip must have one size"
            )
        self._taken += 1
        if self._first is None:
            return self._start(unit)
        if known is None:
            labels = transfer_labels(unit, [self._first, *self._recent], self._settings)
        else:
            labels = known.to(unit)
        self._recent.append(LabelledFrame(unit, labels))
        return labels

    def _start(self, unit: Tensor) -> Tensor:
        is_filled = self._settings.protocol == "cropmae"
        labels = self._first_labels.to(unit)
        self._first = LabelledFrame(unit, labels, is_limited=not is_filled)
        self._recent.extend([LabelledFrame(unit, labels)] * (self._settings.context if is_filled else 0))
        return labels


def propagate(features: Iterable[Tensor], first_labels: Tensor, settings: PropagationSettings) -> Iterator[Tensor]:
    """Yield the soft labels [C, h, w] of every frame of a clip, the first as given; see `LabelPropagation`."""
    propagation = LabelPropagation(first_labels, settings)
    for frame in features:
        yield propagation.next(frame)


def transfer_labels(
    target: Tensor, context: Sequence[LabelledFrame], settings: PropagationSettings, *, max_scores: int = _MAX_SCORES
) -> Tensor:
    """Return the labels [C, h, w] of a frame, from those of the frames in its context.

    In words: for each patch, the cosine similarities to all patches of the context within the radius; of these the top
    k, however they are spread over the frames; the mean of their labels, weighted by softmax(similarity / temperature).
    The similarities are made for a few rows of patches and one frame at a time: the top k of all frames are among the
    top k of each.

    Args:
        target: [D, h, w] of unit length.
        context: frames with labels.
        settings: how labels are carried on.
        max_scores: similarities that are held at a time, at least those of one row of patches.
    """
    _, h, w = target.shape
    labels = torch.cat([frame.labels.flatten(1) for frame in context], dim=1).T  # [n * h * w, C]
    rows = 1
    while rows < h and (rows + 1) * w * _source_rows(rows + 1, h, context, settings) * w <= max_scores:
        rows += 1
    pieces = []
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        scores, index = _nearest(target, context, (top, bottom), settings)  # [q, k] each, q = (bottom - top) * w
        weights = (scores / settings.temperature).softmax(dim=1)
        pieces.append((weights.unsqueeze(2) * labels[index]).sum(dim=1))  # [q, C]
    return torch.cat(pieces).T.reshape(-1, h, w)  # [C, h, w]


def _source_rows(rows: int, h: int, context: Sequence[LabelledFrame], settings: PropagationSettings) -> int:
    """Return how many rows of a frame may hold the sources of so many rows of patches."""
    is_whole = not settings.radius or not all(frame.is_limited for frame in context)
    return h if is_whole else min(h, rows + 2 * settings.radius)


def _nearest(
    target: Tensor, context: Sequence[LabelledFrame], span: tuple[int, int], settings: PropagationSettings
) -> tuple[Tensor, Tensor]:
    """Return the top k similarities [q, k] of the patches in rows `span`, and where they are in all frames' patches."""
    D, h, w = target.shape
    top, bottom = span
    queries = target[:, top:bottom].flatten(1).T  # [q, D]
    low, high = max(top - settings.radius, 0), min(bottom + settings.radius, h)
    is_far = _farther_than(settings.radius, (top, bottom), (low, high), w, target.device)  # [q, (high - low) * w]
    all_scores, all_index = [], []
    for number, frame in enumerate(context):
        is_limited = frame.is_limited and settings.radius > 0
        first_row, last_row = (low, high) if is_limited else (0, h)
        scores = queries @ frame.features[:, first_row:last_row].reshape(D, -1)  # [q, s]
        if is_limited:
            scores.masked_fill_(is_far, -torch.inf)
        best, index = scores.topk(min(settings.top_k, scores.shape[1]), dim=1)
        all_scores.append(best)
        all_index.append(index + (number * h + first_row) * w)
    scores, index = torch.cat(all_scores, dim=1), torch.cat(all_index, dim=1)  # [q, n * k]
    best, place = scores.topk(min(settings.top_k, scores.shape[1]), dim=1)
    return best, index.gather(1, place)


def _farther_than(
    radius: int, rows: tuple[int, int], source_rows: tuple[int, int], w: int, device: torch.device
) -> Tensor:
    """Return [q, s] bool: which patches of `source_rows` are more than `radius` away, along an axis, from `rows`."""
    targets, sources = (torch.arange(*span, device=device) for span in (rows, source_rows))
    columns = torch.arange(w, device=device)
    far_rows = (targets[:, None] - sources).abs() > radius  # [r, t]
    far_columns = (columns[:, None] - columns).abs() > radius  # [w, w]
    far = far_rows[:, None, :, None] | far_columns[None, :, None, :]  # [r, w, t, w]
    return far.flatten(2).flatten(0, 1)


def first_frame_labels(mask: Tensor, ids: Sequence[int], grid: tuple[int, int], protocol: str = "dino") -> Tensor:
    """Return the labels [C, h, w] float32 of a first frame's patches, one channel for each of `ids`.

    `dino`: the label of the pixel in the middle of a patch. `cropmae`: weights, interpolated linearly between the four
    pixels around it. Other values in the mask, such as void pixels, are no label.

    Args:
        mask: [H, W] integers.
        ids: values of the mask, the background among them.
        grid: (h, w).
        protocol: one of `PROTOCOLS`.
    """
    one_hot = torch.stack([mask == number for number in ids]).float()  # [C, H, W]
    if protocol == "dino":
        return F.interpolate(one_hot[None], size=grid, mode="nearest-exact")[0]
    return F.interpolate(one_hot[None], size=grid, mode="bilinear", align_corners=False)[0]


def hard_labels(labels: Tensor, ids: Sequence[int], size: tuple[int, int], protocol: str = "dino") -> Tensor:
    """Return an index mask [H, W] uint8 from soft labels [C, h, w]: bilinear to (H, W), then the largest wins.

    Args:
        labels: soft labels.
        ids: what each channel stands for.
        size: (H, W).
        protocol: `dino` stretches each channel to [0, 1] over the frame first.
    """
    scores = F.interpolate(labels[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    if protocol == "dino":
        scores = scores - scores.amin(dim=(1, 2), keepdim=True)
        highest = scores.amax(dim=(1, 2), keepdim=True)
        scores = scores / torch.where(highest > 0, highest, 1.0)
    values = torch.tensor(ids, dtype=torch.uint8, device=labels.device)
    return values[scores.argmax(dim=0)]
