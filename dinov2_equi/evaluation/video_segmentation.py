"""Segmentation of clips from the mask of their first frame, and how well it fits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, image_to_tensor, spread_indices
from dinov2_equi.data.datasets.decode import read_rgb
from dinov2_equi.data.datasets.video_clips import VideoClip
from dinov2_equi.evaluation.dense_features import at_image_size, check_features, fit_size, frozen_feature_map, resample
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.label_propagation import (
    LabelPropagation,
    PropagationSettings,
    first_frame_labels,
    hard_labels,
)
from dinov2_equi.evaluation.mask_metrics import VOID, ClassCounts, IndexMask, ObjectScores, summarise_objects
from dinov2_equi.evaluation.mask_pictures import (
    Picture,
    max_animation_frames,
    overlay,
    shrink,
    write_animation,
    write_index_mask,
)
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.evaluation.stored_features import weights_digest
from dinov2_equi.fsdp.checkpoint import CheckpointStore

logger = logging.getLogger(__name__)

METRICS = ("j_and_f", "miou")
SAVE_EVERY = 10
"""Frames between two states of a clip on disk."""

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


@dataclass
class ClipState:
    """How far a clip is, and all that its next frames depend on beside the files."""

    record: ClipRecord
    """Of the frames that are done."""

    done: int = 0
    """Number of frames that are done, the first ones."""

    labels: dict[int, Tensor] = field(default_factory=dict)
    """Soft labels [C, h, w] of the last frames by number, as many as are looked back at."""


def segment_clip(
    model: EvalModel,
    clip: VideoClip,
    settings: VideoSettings,
    *,
    device: torch.device | str = "cpu",
    state: ClipState | None = None,
) -> Iterator[IndexMask]:
    """Yield the index mask [H, W] of every frame, in the size of the first mask; the first as its patches hold it.

    Only the frames that are looked back at are kept, whatever the length of the clip.

    Args:
        model: its weights live on `device`.
        clip: frames and the mask of the first one.
        settings: sizes and how labels are carried on.
        device: where to compute.
        state: its labels are kept up to date; where frames are done, it goes on with the next one.

    Raises:
        DatasetError: a frame or mask cannot be read; names the file.
        ValueError: for settings out of range, or features that the backbone does not have.
    """
    settings.check()
    check_features(model, settings.features)
    first_mask = clip.load_mask(0)
    assert first_mask is not None
    ids = [0, *object_ids(first_mask)]
    protocol = settings.propagation.protocol
    done, known = (state.done, dict(state.labels)) if state is not None else (0, {})
    propagation: LabelPropagation | None = None
    for number, features in _feature_maps(
        model, clip, settings, device, needed={0, *known, *range(done, len(clip.frames))}
    ):
        if propagation is None:
            grid = (features.shape[1], features.shape[2])
            labels = first_frame_labels(torch.from_numpy(first_mask), ids, grid, protocol)
            _warn_of_lost_objects(clip, labels, ids)
            propagation = LabelPropagation(labels, settings.propagation)
        soft = propagation.next(features, known.get(number))
        if number < done:
            continue
        if state is not None:
            state.labels[number] = soft
            state.labels.pop(number - settings.propagation.context, None)
        yield hard_labels(soft, ids, first_mask.shape, protocol).cpu().numpy()


def object_ids(mask: IndexMask) -> list[int]:
    """Return the indices in a mask that are objects or classes: neither background nor void."""
    return [int(number) for number in np.unique(mask) if number not in (0, VOID)]


def _feature_maps(
    model: EvalModel, clip: VideoClip, settings: VideoSettings, device: torch.device | str, needed: Container[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield number and feature map [D, h, w] of the frames that are needed, the first among them.

    A frame of another size is resampled to that of the first. Frames go through the backbone in the same batches
    whichever are needed, so that their features are the same to the last digit.
    """
    size: tuple[int, int] | None = None
    for start in range(0, len(clip.frames), settings.batch_size):
        numbers = range(start, min(start + settings.batch_size, len(clip.frames)))
        if not any(number in needed for number in numbers):
            continue
        frames = []
        for number in numbers:
            pixels = image_to_tensor(read_rgb(clip.frames[number]))  # [3, H, W]
            if size is None:
                size = fit_size((pixels.shape[1], pixels.shape[2]), settings.size, model.patch_size)
                model = at_image_size(model, size).to(device)
            frames.append(resample(pixels[None].to(device).float() / 255, size))
        maps = frozen_feature_map(model, torch.cat(frames), features=settings.features)
        yield from ((number, found) for number, found in zip(numbers, maps, strict=True) if number in needed)


def _warn_of_lost_objects(clip: VideoClip, labels: Tensor, ids: Sequence[int]) -> None:
    weights = labels.flatten(1).amax(dim=1)
    lost = [str(number) for number, weight in zip(ids, weights.tolist(), strict=True) if number and not weight]
    if lost:
        logger.warning(
            "clip %s: object %s lies between the patches and is lost at the start", clip.name, ", ".join(lost)
        )


def new_state(clip: VideoClip, metric: str) -> ClipState:
    """Return the state of a clip before its first frame."""
    propagated, copied = (ObjectScores() if metric == "j_and_f" else ClassCounts() for _ in range(2))
    return ClipState(ClipRecord(clip.name, len(clip.frames), len(scored_frames(clip, metric)), propagated, copied))


def score_clip(
    clip: VideoClip,
    masks: Iterator[IndexMask],
    metric: str,
    *,
    on_mask: Callable[[int, IndexMask], None],
    state: ClipState | None = None,
) -> ClipRecord:
    """Return how well predicted masks fit the known ones, and how well the first mask does.

    Args:
        clip: with the known masks.
        masks: a predicted mask [H, W] of each frame that is not done.
        metric: one of `METRICS`.
        on_mask: called with the number of each frame and its predicted mask, once the frame counts as done.
        state: kept up to date; where frames are done, `masks` are of the next ones.

    Raises:
        DatasetError: the first mask holds no object, or a mask has another size than the first; names the file.
    """
    first = clip.load_mask(0)
    assert first is not None
    objects = object_ids(first)
    if metric == "j_and_f" and not objects:
        raise DatasetError(f"clip {clip.name}: the mask {clip.masks[0]} holds no object; give one that does")
    state = state or new_state(clip, metric)
    scored = scored_frames(clip, metric)
    for number, predicted in enumerate(masks, start=state.done):
        truth = clip.load_mask(number) if number in scored else None
        if truth is not None:
            _check_size(clip, number, truth, first)
            _score(state.record.propagated, predicted, truth, objects)
            _score(state.record.copied, first, truth, objects)
        state.done = number + 1
        on_mask(number, predicted)
    return state.record


def _check_size(clip: VideoClip, number: int, mask: IndexMask, first: IndexMask) -> None:
    if mask.shape != first.shape:
        raise DatasetError(
            f"clip {clip.name}: expected masks of {list(first.shape)} pixels as the first, got {list(mask.shape)} in "
            f"{clip.masks[number]}"
        )


def _score(scores: Scores, mask: IndexMask, truth: IndexMask, objects: Sequence[int]) -> None:
    if isinstance(scores, ObjectScores):
        scores.add(mask, truth, objects)
    else:
        scores.add(np.where(mask == VOID, np.uint8(0), mask), truth)


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
    return _as_record(document, metric) if document.pop("key", None) == key else None


def _as_record(document: Mapping[str, Any], metric: str) -> ClipRecord:
    kind = ObjectScores if metric == "j_and_f" else ClassCounts
    scores = {
        name: kind(**{part: {int(k): v for k, v in found.items()} for part, found in document[name].items()})
        for name in ("propagated", "copied")
    }
    return ClipRecord(**{**document, **scores})


def _save_state(store: CheckpointStore, state: ClipState, key: str) -> None:
    labels = {str(number): soft for number, soft in state.labels.items()}
    store.save(state.done, {"labels": labels}, {"key": key, "record": dataclasses.asdict(state.record)})


def _restored_state(store: CheckpointStore, clip: VideoClip, metric: str, key: str) -> ClipState:
    """Return the state of a clip that was stopped, or that before its first frame."""
    if store.latest_step() is None:
        return new_state(clip, metric)
    checkpoint = store.load()
    if checkpoint.state["key"] != key:
        shutil.rmtree(store.directory)  # later steps of it would be preferred to those of the clip that begins now
        store.directory.mkdir()
        return new_state(clip, metric)
    labels = {int(number): soft for number, soft in checkpoint.tensors["labels"].items()}
    return ClipState(_as_record(checkpoint.state["record"], metric), checkpoint.step, labels)


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

    Writes `folder/masks/CLIP/*.png` as the frames are segmented, then the animation `folder/pictures/CLIP.mp4` or
    `.gif`, and last of all `folder/clips/CLIP.json`. What is stopped on the way goes on from `folder/partial/CLIP`, to
    the same masks on the same device.

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
    advance = on_frame or (lambda: None)
    record = read_record(path, key, settings.metric)
    if record is not None:
        for _ in clip.frames:
            advance()
        return record
    mask_paths = [folder / "masks" / clip.name / f"{frame.stem}.png" for frame in clip.frames]
    store = CheckpointStore(folder / "partial" / clip.name, keep=1)
    store.directory.mkdir(parents=True, exist_ok=True)  # every process has clips of its own
    state = _restored_state(store, clip, settings.metric, key)
    for _ in range(state.done):
        advance()

    def keep(number: int, mask: IndexMask) -> None:
        write_index_mask(mask_paths[number], mask)
        if state.done % SAVE_EVERY == 0:
            _save_state(store, state, key)
        advance()

    masks = segment_clip(model, clip, settings, device=device, state=state)
    record = score_clip(clip, masks, settings.metric, on_mask=keep, state=state)
    write_animation(folder / "pictures" / clip.name, clip_pictures(clip, mask_paths, max_frames=max_animation_frames()))
    write_record(path, record, key)
    shutil.rmtree(store.directory)
    return record


def clip_pictures(clip: VideoClip, mask_paths: Sequence[Path], max_frames: int | None = None) -> Iterator[Picture]:
    """Yield frames, all or some evenly spread, with the predicted mask over them, and beside it the known one.

    The known one only where it is known of every frame.

    Args:
        clip: frames and known masks.
        mask_paths: index mask files of the prediction, one a frame.
        max_frames: at most so many; None: all.
    """
    predicted = VideoClip(clip.name, clip.frames, tuple(mask_paths))
    numbers = spread_indices(len(clip.frames), max_frames or len(clip.frames))
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
