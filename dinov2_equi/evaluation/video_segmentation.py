"""Segmentation of clips from the mask of their first frame, and how well it fits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, image_to_tensor
from dinov2_equi.data.datasets.decode import read_rgb
from dinov2_equi.data.datasets.video_clips import VideoClip
from dinov2_equi.evaluation.dense_features import at_image_size, check_features, fit_size, frozen_feature_map, resample
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.label_propagation import (
    PropagationSettings,
    first_frame_labels,
    hard_labels,
    propagate,
)
from dinov2_equi.evaluation.mask_metrics import VOID, ClassCounts, IndexMask, ObjectScores, summarise_objects
from dinov2_equi.evaluation.mask_pictures import Picture, overlay, shrink, write_gif, write_index_mask
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.evaluation.stored_features import weights_digest

logger = logging.getLogger(__name__)

METRICS = ("j_and_f", "miou")
MAX_GIF_FRAMES = 60

_FORMAT = 1
_GAP = 4  # pixels between two pictures

Scores = ObjectScores | ClassCounts


@dataclass(frozen=True)
class VideoSettings:
    """How clips are segmented and scored.

    Attributes:
        size: the shorter side of the frames as the backbone sees them, or both (H, W), pixels; see `fit_size`.
        metric: `j_and_f`, the objects of the first mask, scored without the first and the last frame as in DAVIS; or
            `miou`, classes, counted over all frames with a mask as in VIP.
        features: one of `dense_features.DENSE_FEATURES`.
        propagation: how labels are carried on.
        batch_size: frames in one forward pass.
    """

    size: int | tuple[int, int] = 480
    metric: str = "j_and_f"
    features: str = "patches"
    propagation: PropagationSettings = field(default_factory=PropagationSettings)
    batch_size: int = 4

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        self.propagation.check()
        sides = (self.size,) if isinstance(self.size, int) else self.size
        if min(sides) < 1 or self.batch_size < 1:
            raise ValueError(f"expected a size and a batch size of at least 1, got {self.size} and {self.batch_size}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {self.metric!r}")


@dataclass(frozen=True)
class ClipRecord:
    """What was found of one clip."""

    name: str
    num_frames: int
    num_scored: int
    """Frames that were compared with a mask."""

    propagated: Scores
    copied: Scores
    """Of the first mask taken for every frame: below this, the features are worse than none."""


def segment_clip(
    model: EvalModel, clip: VideoClip, settings: VideoSettings, *, device: torch.device | str = "cpu"
) -> Iterator[IndexMask]:
    """Yield the index mask [H, W] of every frame, in the size of the first mask; the first as its patches hold it.

    Args:
        model: its weights live on `device`.
        clip: frames and the mask of the first one.
        settings: sizes and how labels are carried on.
        device: where to compute.

    Raises:
        DatasetError: a frame or mask cannot be read; names the file.
        ValueError: for settings out of range, or features that the backbone does not have.
    """
    settings.check()
    check_features(model, settings.features)
    first_mask = clip.load_mask(0)
    assert first_mask is not None
    ids = [0, *object_ids(first_mask)]
    maps = _feature_maps(model, clip, settings, device)
    first = next(maps)
    protocol = settings.propagation.protocol
    labels = first_frame_labels(torch.from_numpy(first_mask), ids, (first.shape[1], first.shape[2]), protocol)
    _warn_of_lost_objects(clip, labels, ids)
    for soft in propagate(_chain(first, maps), labels, settings.propagation):
        yield hard_labels(soft, ids, first_mask.shape, protocol).cpu().numpy()


def object_ids(mask: IndexMask) -> list[int]:
    """Return the indices in a mask that are objects or classes: neither background nor void."""
    return [int(number) for number in np.unique(mask) if number not in (0, VOID)]


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _feature_maps(
    model: EvalModel, clip: VideoClip, settings: VideoSettings, device: torch.device | str
) -> Iterator[Tensor]:
    """Yield the feature map [D, h, w] of each frame; a frame of another size is resampled to that of the first."""
    size: tuple[int, int] | None = None
    for start in range(0, len(clip.frames), settings.batch_size):
        frames = []
        for path in clip.frames[start : start + settings.batch_size]:
            pixels = image_to_tensor(read_rgb(path))  # [3, H, W]
            if size is None:
                size = fit_size((pixels.shape[1], pixels.shape[2]), settings.size, model.patch_size)
                model = at_image_size(model, size).to(device)
            frames.append(resample(pixels[None].to(device).float() / 255, size))
        yield from frozen_feature_map(model, torch.cat(frames), features=settings.features)


def _warn_of_lost_objects(clip: VideoClip, labels: Tensor, ids: Sequence[int]) -> None:
    weights = labels.flatten(1).amax(dim=1)
    lost = [str(number) for number, weight in zip(ids, weights.tolist(), strict=True) if number and not weight]
    if lost:
        logger.warning(
            "clip %s: object %s lies between the patches and is lost at the start", clip.name, ", ".join(lost)
        )


def score_clip(
    clip: VideoClip, masks: Iterator[IndexMask], metric: str, *, on_mask: Callable[[int, IndexMask], None]
) -> ClipRecord:
    """Return how well predicted masks fit the known ones, and how well the first mask does.

    Args:
        clip: with the known masks.
        masks: a predicted mask [H, W] of each frame.
        metric: one of `METRICS`.
        on_mask: called with the number of each frame and its predicted mask.

    Raises:
        DatasetError: the first mask holds no object, or a mask has another size than the first; names the file.
    """
    first = clip.load_mask(0)
    assert first is not None
    objects = object_ids(first)
    if metric == "j_and_f" and not objects:
        raise DatasetError(f"clip {clip.name}: the mask {clip.masks[0]} holds no object; give one that does")
    propagated, copied = (ObjectScores() if metric == "j_and_f" else ClassCounts() for _ in range(2))
    scored = scored_frames(clip, metric)
    for number, predicted in enumerate(masks):
        on_mask(number, predicted)
        truth = clip.load_mask(number) if number in scored else None
        if truth is None:
            continue
        if truth.shape != first.shape:
            raise DatasetError(
                f"clip {clip.name}: expected masks of {list(first.shape)} pixels as the first, got "
                f"{list(truth.shape)} in {clip.masks[number]}"
            )
        for scores, mask in ((propagated, predicted), (copied, first)):
            if isinstance(scores, ObjectScores):
                scores.add(mask, truth, objects)
            else:
                scores.add(np.where(mask == VOID, np.uint8(0), mask), truth)
    return ClipRecord(clip.name, len(clip.frames), len(scored), propagated, copied)


def scored_frames(clip: VideoClip, metric: str) -> set[int]:
    """Return the frames that count: with `j_and_f` those with a mask but the clip's first and last, else all of them.

    A clip of two frames is scored on its second.
    """
    known = {number for number, mask in enumerate(clip.masks) if mask is not None}
    if metric == "miou":
        return known
    last = len(clip.frames) - 1
    return known - ({0, last} if last > 1 else {0})


def summarise(metric: str, scores: Sequence[Scores]) -> dict[str, float]:
    """Return the numbers of clips together, fractions: J&F with its parts, or mIoU over all their pixels."""
    if metric == "j_and_f":
        return summarise_objects([found for found in scores if isinstance(found, ObjectScores)])
    total = ClassCounts()
    for found in scores:
        if isinstance(found, ClassCounts):
            total.update(found)
    return {"mIoU": total.mean_intersection_over_union()}


def backbone_identity(model: EvalModel) -> str:
    """Return a SHA-256 of what the features of a backbone depend on: weights, split and normalisation."""
    split = None if model.split is None else [weights_digest(model.split), model.split_block]
    facts = [weights_digest(model.backbone), split, model.mean, model.std, model.patch_size]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def record_key(identity: str, clip: VideoClip, settings: VideoSettings) -> str:
    """Return a SHA-256 of what the masks of a clip depend on: backbone, settings, names and sizes of its files."""
    files = [path for path in (*clip.frames, *clip.masks) if path is not None]
    facts = {
        "format": _FORMAT,
        "backbone": identity,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "batch_size"},
        "files": [[path.name, path.stat().st_size] for path in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: ClipRecord, key: str) -> None:
    """Write what was found of a clip; half a file is never seen."""
    write_text_atomically(path, json.dumps({"key": key} | dataclasses.asdict(record), indent=1) + "\n")


def read_record(path: Path, key: str, metric: str) -> ClipRecord | None:
    """Return what was found of a clip by the same weights and settings; None where there is no such file."""
    if not path.is_file():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.pop("key", None) != key:
        return None
    kind = ObjectScores if metric == "j_and_f" else ClassCounts
    for name in ("propagated", "copied"):
        counts = {part: {int(k): v for k, v in found.items()} for part, found in document[name].items()}
        document[name] = kind(**counts)
    return ClipRecord(**document)


def measure_clip(
    model: EvalModel,
    clip: VideoClip,
    settings: VideoSettings,
    folder: Path,
    *,
    identity: str,
    device: torch.device | str = "cpu",
    on_frame: Callable[[], None] | None = None,
) -> ClipRecord:
    """Return what was found of a clip, from `folder` where the same was measured before.

    Writes `folder/masks/CLIP/*.png` as the frames are segmented, then `folder/pictures/CLIP.gif`, and last of all
    `folder/clips/CLIP.json`: what ends before that is done again.

    Args:
        model: its weights live on `device`.
        clip: frames and masks.
        settings: how it is segmented and scored.
        folder: of one backbone.
        identity: of the backbone, see `backbone_identity`.
        device: where to compute.
        on_frame: called for each frame, whether it is computed or was before.
    """
    path = folder / "clips" / f"{clip.name}.json"
    key = record_key(identity, clip, settings)
    record = read_record(path, key, settings.metric)
    mask_paths = [folder / "masks" / clip.name / f"{frame.stem}.png" for frame in clip.frames]

    def advance(number: int, mask: IndexMask | None = None) -> None:
        if mask is not None:
            write_index_mask(mask_paths[number], mask)
        if on_frame is not None:
            on_frame()

    if record is not None:
        for number in range(len(clip.frames)):
            advance(number)
        return record
    masks = segment_clip(model, clip, settings, device=device)
    record = score_clip(clip, masks, settings.metric, on_mask=advance)
    write_gif(folder / "pictures" / f"{clip.name}.gif", clip_pictures(clip, mask_paths))
    write_record(path, record, key)
    return record


def clip_pictures(clip: VideoClip, mask_paths: Sequence[Path], max_frames: int = MAX_GIF_FRAMES) -> Iterator[Picture]:
    """Yield frames, evenly spread, with the predicted mask over them; beside it the known one, where all are known.

    Args:
        clip: frames and known masks.
        mask_paths: index mask files of the prediction, one a frame.
        max_frames: at most so many.
    """
    predicted = VideoClip(clip.name, clip.frames, tuple(mask_paths))
    count = min(len(clip.frames), max_frames)
    numbers = [index * len(clip.frames) // count for index in range(count)]
    sources = [predicted, clip] if all(clip.masks) else [predicted]
    size: tuple[int, int] | None = None
    for number in numbers:
        image = read_rgb(clip.frames[number])
        size = size or image.size
        photograph = np.asarray(image if image.size == size else image.resize(size))
        panels = []
        for source in sources:
            mask = source.load_mask(number)
            assert mask is not None
            panels.append(shrink(overlay(photograph, mask)))
        gap = np.full((panels[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
        yield np.concatenate([panels[0], *(part for panel in panels[1:] for part in (gap, panel))], axis=1)
