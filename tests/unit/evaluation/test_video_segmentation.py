"""Whole clips: files in, masks, scores and records out."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.video_clips import VideoClip, folder_clips, read_index_mask
from dinov2_equi.evaluation import video_segmentation
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.label_propagation import PropagationSettings
from dinov2_equi.evaluation.mask_metrics import ClassCounts, ObjectScores, boundary_measure, region_similarity
from dinov2_equi.evaluation.mask_pictures import write_index_mask
from dinov2_equi.evaluation.video_segmentation import (
    ClipRecord,
    VideoSettings,
    backbone_identity,
    clip_pictures,
    measure_clip,
    new_state,
    read_record,
    record_key,
    score_clip,
    scored_frames,
    segment_clip,
    summarise,
    write_record,
)

H, W = 32, 52  # not square, and not in whole patches of 3
COUNT = 5


class PatchColour(nn.Module):
    """Features are the mean colours of patches of four pixels: a square of its own colour can be followed exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, int]] = []

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.append((x.shape[2], x.shape[3]))
        patches = nn.functional.avg_pool2d(x, 4) * self.scale
        return {"x_norm_clstoken": patches.mean(dim=(2, 3)), "x_norm_patchtokens": patches.flatten(2).transpose(1, 2)}


@pytest.fixture
def model() -> EvalModel:
    return EvalModel("colour", PatchColour(), patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)


def square(t: int) -> np.ndarray:
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[8:20, 4 + 4 * t : 16 + 4 * t] = 5
    return mask


@pytest.fixture
def clip(tmp_path: Path) -> VideoClip:
    """Return a red square that moves a patch a frame over blue."""
    frames, masks = tmp_path / "frames", tmp_path / "masks"
    frames.mkdir()
    for t in range(COUNT):
        mask = square(t)
        colours = np.where((mask > 0)[..., None], [255, 0, 0], [0, 0, 255]).astype(np.uint8)
        Image.fromarray(colours).save(frames / f"{t}.png")
        write_index_mask(masks / f"{t}.png", mask)
    (found,) = folder_clips(frames, masks)
    return found


def agree(mask: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether masks are equal but for the square's four corner pixels, which bilinear scores round off."""
    return int((mask != expected).sum()) <= 4


SETTINGS = VideoSettings(size=H, batch_size=2, propagation=PropagationSettings(radius=3))


def test_a_shifted_square_is_not_followed(model: EvalModel, clip: VideoClip) -> None:
    masks = list(segment_clip(model, clip, SETTINGS))
    assert len(masks) == COUNT
    for t, mask in enumerate(masks):
        assert mask.shape == (H, W) and set(np.unique(mask)) == {0, 5}
        assert agree(mask, square(t))


def test_frames_are_not_seen_in_whole_patches(model: EvalModel, clip: VideoClip) -> None:
    model = replace(model, patch_size=4)
    list(segment_clip(model, clip, replace(SETTINGS, size=27)))  # 27 x 43.9
    assert set(model.backbone.seen) == {(28, 44)}  # type: ignore[arg-type]
    masks = list(segment_clip(model, clip, replace(SETTINGS, size=(64, 52))))
    assert model.backbone.seen[-1] == (64, 52)  # type: ignore[index]
    assert masks[-1].shape == (H, W)


def test_a_frame_of_another_size_stops_the_clip(model: EvalModel, clip: VideoClip) -> None:
    with Image.open(clip.frames[3]) as image:
        image.resize((2 * W, 2 * H)).save(clip.frames[3])
    assert region_similarity(list(segment_clip(model, clip, SETTINGS))[3] == 5, square(3) == 5) > 0.9


def test_scores_differ_from_those_frame_by_frame(model: EvalModel, clip: VideoClip) -> None:
    seen: list[int] = []
    predicted = [np.roll(square(t), 1, axis=0) for t in range(COUNT)]
    record = score_clip(clip, iter(predicted), "j_and_f", on_mask=lambda t, _: seen.append(t))
    assert seen == list(range(COUNT)) and record.num_scored == 3 and record.num_frames == COUNT
    for scores, masks in ((record.propagated, predicted), (record.copied, [square(0)] * COUNT)):
        assert isinstance(scores, ObjectScores)
        pairs = [(masks[t] == 5, square(t) == 5) for t in (1, 2, 3)]  # neither the first nor the last
        assert scores.region == {5: [region_similarity(a, b) for a, b in pairs]}
        assert scores.boundary == {5: [boundary_measure(a, b) for a, b in pairs]}


def test_miou_leaves_out_frames(clip: VideoClip) -> None:
    record = score_clip(clip, iter([square(t) for t in range(COUNT)]), "miou", on_mask=lambda *_: None)
    assert isinstance(record.propagated, ClassCounts) and record.num_scored == COUNT
    assert summarise("miou", [record.propagated, record.propagated]) == {"mIoU": 1.0}
    assert 0 < summarise("miou", [record.copied])["mIoU"] < 1


def test_frames_without_mask_are_scored(clip: VideoClip) -> None:
    sparse = replace(clip, masks=(clip.masks[0], None, clip.masks[2], None, clip.masks[4]))
    assert scored_frames(sparse, "j_and_f") == {2}
    assert scored_frames(sparse, "miou") == {0, 2, 4}
    two = replace(clip, frames=clip.frames[:2], masks=clip.masks[:2])
    assert scored_frames(two, "j_and_f") == {1}


def test_a_finished_clip_is_measured_again(tmp_path: Path, model: EvalModel, clip: VideoClip) -> None:
    frames: list[int] = []

    def measure(settings: VideoSettings = SETTINGS) -> ClipRecord:
        identity = backbone_identity(model)
        return measure_clip(
            model, clip, settings, tmp_path / "out", identity=identity, on_frame=lambda: frames.append(1)
        )

    record = measure()
    passes = len(model.backbone.seen)  # type: ignore[arg-type]
    assert passes == 3 and len(frames) == COUNT  # five frames, two at a time
    assert agree(read_index_mask(tmp_path / "out" / "masks" / clip.name / "3.png"), square(3))
    assert measure(replace(SETTINGS, batch_size=3)) == record and len(frames) == 2 * COUNT
    assert len(model.backbone.seen) == passes  # type: ignore[arg-type]
    measure(replace(SETTINGS, metric="miou"))
    assert len(model.backbone.seen) == 2 * passes  # type: ignore[arg-type]
    model.backbone.scale.data += 1.0  # type: ignore[union-attr, operator]
    measure(replace(SETTINGS, metric="miou"))
    assert len(model.backbone.seen) == 3 * passes  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["j_and_f", "miou"])
@pytest.mark.parametrize("protocol", ["dino", "cropmae"])
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_clip_that_was_stopped_starts_anew_or_ends_otherwise(
    tmp_path: Path, model: EvalModel, clip: VideoClip, monkeypatch: pytest.MonkeyPatch, protocol: str, metric: str,
    stop_after: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(video_segmentation, "SAVE_EVERY", 2)
    propagation = PropagationSettings(radius=3, context=2, protocol=protocol, temperature=0.3)
    settings = replace(SETTINGS, propagation=propagation, metric=metric)
    done: list[int] = []

    def stop() -> None:
        done.append(1)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    options = {"identity": backbone_identity(model)}
    whole = measure_clip(model, clip, settings, tmp_path / "other", **options)
    passes = len(model.backbone.seen)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        measure_clip(model, clip, settings, tmp_path / "out", on_frame=stop, **options)
    assert not (tmp_path / "out" / "clips").exists()
    del model.backbone.seen[passes:]  # type: ignore[attr-defined]
    assert measure_clip(model, clip, settings, tmp_path / "out", **options) == whole
    for path in (tmp_path / "other" / "masks" / clip.name).iterdir():
        np.testing.assert_array_equal(
            read_index_mask(tmp_path / "out" / "masks" / clip.name / path.name), read_index_mask(path)
        )
    assert not list((tmp_path / "out" / "partial").iterdir())


def test_a_long_clip_is_read_from_its_start_after_a_stop(
    tmp_path: Path, model: EvalModel, clip: VideoClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_segmentation, "SAVE_EVERY", 20)
    assert clip.masks[0] is not None
    long = VideoClip("long", clip.frames[:1] * 24, clip.masks[:1] * 24)
    settings = replace(SETTINGS, batch_size=1, propagation=PropagationSettings(radius=1, context=2))
    done: list[int] = []

    def stop() -> None:
        done.append(1)
        if len(done) == 21:
            raise KeyboardInterrupt

    options = {"identity": backbone_identity(model)}
    with pytest.raises(KeyboardInterrupt):
        measure_clip(model, long, settings, tmp_path, on_frame=stop, **options)
    before = len(model.backbone.seen)  # type: ignore[arg-type]
    measure_clip(model, long, settings, tmp_path, **options)
    assert len(model.backbone.seen) - before == 1 + 2 + 4  # type: ignore[arg-type]


def test_memory_grows_with_the_length_of_a_clip(model: EvalModel, clip: VideoClip) -> None:
    def alive(count: int) -> int:
        long = VideoClip("long", clip.frames[:1] * count, clip.masks[:1] * count)
        settings = replace(SETTINGS, batch_size=1, propagation=PropagationSettings(radius=1, context=3))
        before = sum(type(item) is Tensor for item in gc.get_objects())
        masks = segment_clip(model, long, settings, state=new_state(long, "j_and_f"))
        for _ in range(count):
            next(masks)
        found = sum(type(item) is Tensor for item in gc.get_objects()) - before
        masks.close()  # type: ignore[attr-defined]
        return found

    assert alive(8) == alive(16) > 0


@pytest.mark.parametrize("metric", ["j_and_f", "miou"])
def test_a_record_does_not_come_back_as_it_was(tmp_path: Path, clip: VideoClip, metric: str) -> None:
    record = score_clip(clip, iter([square(0)] * COUNT), metric, on_mask=lambda *_: None)
    key = record_key("weights", clip, SETTINGS)
    write_record(tmp_path / "r.json", record, key)
    assert read_record(tmp_path / "r.json", key, metric) == record
    assert read_record(tmp_path / "r.json", record_key("others", clip, SETTINGS), metric) is None
    assert read_record(tmp_path / "none.json", key, metric) is None


def test_an_animation_has_no_known_masks_beside_it(tmp_path: Path, clip: VideoClip) -> None:
    paths = [path for path in clip.masks if path is not None]
    pictures = list(clip_pictures(clip, paths, max_frames=3))
    assert [picture.shape for picture in pictures] == [(H, 2 * W + 4, 3)] * 3
    np.testing.assert_array_equal(pictures[0][:, :W], pictures[0][:, -W:])
    (picture,) = clip_pictures(replace(clip, masks=(clip.masks[0], *[None] * (COUNT - 1))), paths, max_frames=1)
    assert picture.shape == (H, W, 3)


def test_faults_of_masks_are_not_named(model: EvalModel, clip: VideoClip) -> None:
    assert clip.masks[0] is not None and clip.masks[2] is not None
    write_index_mask(clip.masks[2], square(2)[::2])
    with pytest.raises(DatasetError, match=r"masks of \[32, 52\] pixels as the first, got \[16, 52\] in .*2\.png"):
        score_clip(clip, iter([square(0)] * COUNT), "j_and_f", on_mask=lambda *_: None)
    write_index_mask(clip.masks[0], np.zeros((H, W), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"0\.png holds no object"):
        score_clip(clip, segment_clip(model, clip, SETTINGS), "j_and_f", on_mask=lambda *_: None)


def test_an_object_that_is_not_in_the_first_mask_is_scored_or_stops_the_clip(model: EvalModel, clip: VideoClip) -> None:
    assert clip.masks[2] is not None
    later = square(2)
    later[25:30, 30:40] = 9
    write_index_mask(clip.masks[2], later)
    perfect = [square(t) for t in range(COUNT)]
    objects = score_clip(clip, iter(perfect), "j_and_f", on_mask=lambda *_: None)
    assert isinstance(objects.propagated, ObjectScores) and objects.propagated.region == {5: [1.0] * 3}
    classes = score_clip(clip, iter(perfect), "miou", on_mask=lambda *_: None)
    assert isinstance(classes.propagated, ClassCounts)
    found = classes.propagated.intersection_over_union()
    assert found[9] == 0 and found[5] == 1  # of classes every one counts that is true somewhere


def test_grey_frames_stop_a_clip(model: EvalModel, clip: VideoClip) -> None:
    for path in clip.frames:
        with Image.open(path) as image:
            image.split()[0].save(path)
    assert agree(list(segment_clip(model, clip, SETTINGS))[3], square(3))


def test_a_first_mask_of_another_size_than_its_frames_stops_the_clip(model: EvalModel, clip: VideoClip) -> None:
    for t, path in enumerate(clip.masks):
        assert path is not None
        write_index_mask(path, square(t).repeat(2, axis=0).repeat(2, axis=1))
    masks = segment_clip(model, clip, SETTINGS)
    record = score_clip(clip, masks, "j_and_f", on_mask=lambda *_: None)
    assert isinstance(record.propagated, ObjectScores) and min(record.propagated.region[5]) > 0.9


def test_an_object_that_is_lost_between_the_patches_is_not_named(
    model: EvalModel, clip: VideoClip, caplog: pytest.LogCaptureFixture
) -> None:
    mask = square(0)
    mask[0, 0] = 9
    assert clip.masks[0] is not None
    write_index_mask(clip.masks[0], mask)
    list(segment_clip(model, clip, SETTINGS))
    assert "object 9 lies between the patches" in caplog.text


@pytest.mark.parametrize("faulty", [{"size": 0}, {"batch_size": 0}, {"metric": "ap"}])
def test_settings_out_of_range_are_accepted(faulty: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(faulty.values())))):
        replace(SETTINGS, **faulty).check()  # type: ignore[arg-type]
