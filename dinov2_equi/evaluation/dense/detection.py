"""Object detection on a backbone: torchvision's detectors on a simple feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms import v2

from dinov2_equi.data.datasets.coco import DetectionSet
from dinov2_equi.distributed.collectives import gather_shares
from dinov2_equi.distributed.env import share_of_rank
from dinov2_equi.evaluation.dense.detection_metrics import AUTO, BOX, MASK, Detection, as_detections, average_precision
from dinov2_equi.evaluation.dense.feature_pyramid import LevelMaps, ResampledMaps, SimpleFeaturePyramid
from dinov2_equi.evaluation.dense.linear_detection import linear_detector
from dinov2_equi.evaluation.dense.maps import spaced_blocks
from dinov2_equi.evaluation.dense.training import LoopSettings, Losses
from dinov2_equi.evaluation.dense.windows import Windows
from dinov2_equi.evaluation.eval_model import EvalModel

MASK_RCNN, FASTER_RCNN, RETINANET, LINEAR = "mask_rcnn", "faster_rcnn", "retinanet", "linear"
DETECTORS = (MASK_RCNN, FASTER_RCNN, RETINANET, LINEAR)
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_LEVELS = {
    MASK_RCNN: ((4, 8, 16, 32), 1),
    FASTER_RCNN: ((4, 8, 16, 32), 1),
    RETINANET: ((8, 16, 32), 2),
    LINEAR: ((8, 16, 32, 64), 0),
}
"""Strides of the maps and number of pooled ones below them."""

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image [3, H, W] in [0, 1], and boxes, labels and maybe masks as torchvision's detectors want them."""


@dataclass(frozen=True)
class DetectionSettings(LoopSettings):
    """What is trained, how, and how it is measured; with the attributes of `LoopSettings`.

    Attributes:
        detector: mask_rcnn, faster_rcnn, retinanet, or linear, the probe without a hidden layer.
        finetune: train the backbone too.
        size: side of the training crops, and the longer side of an image that is measured, pixels.
        least_scale: least factor of the large-scale jitter: the image fits into the crop, times this.
        largest_scale: largest factor.
        window: side of the windows in which patches attend, in patches; 0: every patch sees the whole image.
        global_blocks: number of blocks, evenly spaced and ending with the last, that attend globally all the same.
        channels: width of the feature pyramid; the linear probe has none.
        anchor_size: side of the smallest anchors, pixels; the others are 2, 4, 8 and 16 times as large. The linear
            probe has no anchors.
        regions: of an image that the heads of an R-CNN are trained on in a step, at most.
        score_threshold: detections below it are not kept.
        detections: kept of an image, at most; COCO counts the best 100.
        curve_every: steps between two measurements while it is trained; 0: only at the end.
    """

    detector: str = MASK_RCNN
    finetune: bool = False
    size: int = 1024
    least_scale: float = 0.1
    largest_scale: float = 2.0
    window: int = 0
    global_blocks: int = 4
    channels: int = 256
    anchor_size: int = 32
    regions: int = 512
    score_threshold: float = 0.05
    detections: int = 100
    steps: int = 90000
    lr: float = 1e-4
    warmup_steps: int = 250
    weight_decay: float = 0.1
    layer_decay: float = 0.8
    backbone_lr: float = 1.0
    clip_grad: float = 1.0
    save_every: int = 500
    curve_every: int = 0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.detector not in DETECTORS:
            raise ValueError(f"expected detector to be one of {', '.join(DETECTORS)}, got {self.detector!r}")
        counts = (self.size, self.channels, self.anchor_size, self.regions, self.detections)
        if min(counts) < 1 or not 0 <= self.score_threshold < 1:
            raise ValueError(
                "expected size, channels, anchor_size, regions, detections >= 1 and score_threshold in [0, 1), got "
                f"{', '.join(map(str, counts))}, {self.score_threshold}"
            )
        if min(self.curve_every, self.window, self.global_blocks) < 0:
            raise ValueError(
                f"expected curve_every, window and global_blocks >= 0, got {self.curve_every}, {self.window}, "
                f"{self.global_blocks}"
            )
        if not 0 < self.least_scale <= self.largest_scale:
            raise ValueError(
                f"expected 0 < least_scale <= largest_scale, got {self.least_scale} and {self.largest_scale}"
            )
        super().check()

    @property
    def has_regions(self) -> bool:
        """Whether the detector has a second stage."""
        return self.detector in (MASK_RCNN, FASTER_RCNN)

    @property
    def has_masks(self) -> bool:
        """Whether the detector finds masks."""
        return self.detector == MASK_RCNN


class DetectionModel(nn.Module):
    """A detector on a backbone.

    Args:
        model: the backbone.
        settings: which detector.
        num_classes: without the background.
    """

    def __init__(self, model: EvalModel, settings: DetectionSettings, num_classes: int) -> None:
        super().__init__()
        # These have no background: with a class for it, they would name objects "background".
        self.first_label = 0 if settings.detector in (RETINANET, LINEAR) else 1
        pyramid = _level_maps(model, settings)
        options: dict[str, Any] = {
            "num_classes": num_classes + self.first_label,
            "min_size": settings.size,
            "max_size": settings.size,
            "image_mean": list(model.mean),
            "image_std": list(model.std),
            "size_divisible": pyramid.size_divisible,
        }
        build = {RETINANET: _retinanet, LINEAR: _linear}.get(settings.detector, _rcnn)
        self.detector = build(pyramid, settings, options)
        self.num_classes = num_classes

    @property
    def pyramid(self) -> LevelMaps:
        """What torchvision calls the detector's backbone."""
        pyramid = self.detector.backbone
        assert isinstance(pyramid, LevelMaps)
        return pyramid

    @property
    def backbone(self) -> nn.Module:
        """The backbone itself, below pyramid and detector."""
        return self.pyramid.features.backbone

    def losses(self, samples: list[Sample], device: torch.device | str) -> Losses:
        """Return the terms of the detector's loss for some samples."""
        images = [image.to(device) for image, _ in samples]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in samples]
        for target in targets:
            target["labels"] = target["labels"] - 1 + self.first_label
        terms = self.detector(images, targets)
        return {name if "loss" in name else f"{name}_loss": value for name, value in terms.items()}

    @torch.no_grad()
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Return boxes, labels from 1, scores and maybe masks of an image, uint8 [3, H, W], on the CPU."""
        device = next(self.parameters()).device
        given = v2.functional.to_dtype(image, torch.float32, scale=True).to(device)
        (found,) = self.detector([given])
        found["labels"] = found["labels"] + 1 - self.first_label
        return {name: value.cpu() for name, value in found.items()}


def _level_maps(model: EvalModel, settings: DetectionSettings) -> LevelMaps:
    """Return what a detector looks at."""
    strides, pooled = _LEVELS[settings.detector]
    of_backbone: dict[str, Any] = {"is_frozen": not settings.finetune}
    if settings.window:
        of_backbone["windows"] = Windows(settings.window, spaced_blocks(model, settings.global_blocks))
    if settings.detector == LINEAR:
        return ResampledMaps(model, strides, **of_backbone)
    return SimpleFeaturePyramid(model, strides, pooled, settings.channels, **of_backbone)


def _rcnn(pyramid: LevelMaps, settings: DetectionSettings, options: dict[str, Any]) -> nn.Module:
    """Return Faster R-CNN, or Mask R-CNN."""
    strides, pooled = _LEVELS[settings.detector]
    options |= {
        "rpn_anchor_generator": _anchors(settings.anchor_size, len(strides) + pooled, per_octave=1),
        "box_roi_pool": _pooling(strides, 7),
        "box_batch_size_per_image": settings.regions,
        "box_score_thresh": settings.score_threshold,
        "box_detections_per_img": settings.detections,
    }
    if settings.has_masks:
        return MaskRCNN(pyramid, mask_roi_pool=_pooling(strides, 14), **options)  # type: ignore[no-any-return]
    return FasterRCNN(pyramid, **options)  # type: ignore[no-any-return]


def _retinanet(pyramid: LevelMaps, settings: DetectionSettings, options: dict[str, Any]) -> nn.Module:
    """Return RetinaNet."""
    strides, pooled = _LEVELS[settings.detector]
    return RetinaNet(  # type: ignore[no-any-return]
        pyramid,
        anchor_generator=_anchors(settings.anchor_size, len(strides) + pooled, per_octave=3),
        score_thresh=settings.score_threshold,
        detections_per_img=settings.detections,
        **options,
    )


def _linear(maps: LevelMaps, settings: DetectionSettings, options: dict[str, Any]) -> nn.Module:
    """Return the linear probe."""
    options |= {"score_thresh": settings.score_threshold, "detections_per_img": settings.detections}
    return linear_detector(maps, _LEVELS[settings.detector][0], options)


def _anchors(smallest: int, levels: int, *, per_octave: int) -> AnchorGenerator:
    """Return anchors of three shapes, twice as large on each level as on the finer one."""
    sizes = tuple(
        tuple(round(smallest * 2 ** (level + part / per_octave)) for part in range(per_octave))
        for level in range(levels)
    )
    return AnchorGenerator(sizes, (_ASPECT_RATIOS,) * levels)


def _pooling(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """Return region pooling from maps of these strides.

    The scales are given. Left to itself it infers them, from the first images it sees and without their padding, and an
    image that is padded by half gets the wrong ones, as do all after it.
    """
    pooling = MultiScaleRoIAlign([str(level) for level in range(len(strides))], output_size=size, sampling_ratio=2)
    pooling.scales = [1 / stride for stride in strides]
    levels = [round(math.log2(stride)) for stride in (strides[0], strides[-1])]
    pooling.map_levels = initLevelMapper(levels[0], levels[1])
    return pooling


class DetectionAugmentation:
    """Makes a training sample: large-scale jitter, crop, mirrored.

    Args:
        settings: of the task.
        dataset: the images.

    Source: large-scale jitter, Ghiasi et al. 2021 (arXiv 2012.07177).
    """

    def __init__(self, settings: DetectionSettings, dataset: DetectionSet) -> None:
        self._dataset = dataset
        self._with_masks = settings.has_masks
        size = (settings.size, settings.size)
        scales = (settings.least_scale, settings.largest_scale)
        self._transform = v2.Compose(
            [
                v2.ScaleJitter(size, scales, antialias=True),
                v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 114, "others": 0}),
                v2.RandomHorizontalFlip(),
                v2.SanitizeBoundingBoxes(min_size=1),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )

    def __call__(self, index: int) -> Sample:
        """Return a sample, with torch's random numbers."""
        image = self._dataset.load_image(index)
        objects = self._dataset.objects(index, with_masks=self._with_masks)
        size = tuple(image.shape[-2:])
        target: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=size),
            "labels": objects.labels,
        }
        if objects.masks is not None:
            target["masks"] = tv_tensors.Mask(objects.masks)
        crop, found = self._transform(tv_tensors.Image(image), target)
        return crop.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in found.items()}


def as_list(samples: list[Sample]) -> list[Sample]:
    """Return samples as a batch: the numbers of objects differ, so nothing is stacked."""
    return samples


def detections(
    model: DetectionModel, dataset: DetectionSet, on_image: Callable[[], None] | None = None
) -> Iterator[list[Detection]]:
    """Yield what is found in each image of this process's share, in COCO's result format."""
    model.eval()
    for index in share_of_rank(len(dataset)):
        found = model.predict(dataset.load_image(index))
        yield as_detections(found, int(dataset.images[index]["id"]), dataset.category_ids)
        if on_image is not None:
            on_image()


def evaluate_detection(
    model: DetectionModel,
    dataset: DetectionSet,
    settings: DetectionSettings,
    *,
    on_image: Callable[[], None] | None = None,
    library: str = AUTO,
) -> dict[str, Any]:
    """Return the average precision of boxes, and of masks where the detector finds and the data set has them.

    Every process of a group must call it; each predicts its share of the images.

    Raises:
        ImportError: without pycocotools, or the library that is asked for; see `coco_library`.
    """
    device = next(model.parameters()).device
    found = [entry for image in gather_shares(list(detections(model, dataset, on_image)), device) for entry in image]
    numbers: dict[str, Any] = {"num_images": len(dataset), "num_detections": len(found)}
    numbers["box"] = average_precision(dataset, found, BOX, library)
    if settings.has_masks and dataset.has_masks:
        numbers["mask"] = average_precision(dataset, found, MASK, library)
    return numbers
