"""Semantic segmentation on a backbone: training of a linear head and its measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet
from dinov2_equi.distributed.collectives import all_reduce_sum_, sum_over_ranks
from dinov2_equi.distributed.env import share_of_rank
from dinov2_equi.evaluation.dense.maps import DenseBackbone, last_blocks, to_image_size
from dinov2_equi.evaluation.dense.segmentation_metrics import ConfusionMatrix
from dinov2_equi.evaluation.dense.sliding import sliding_window
from dinov2_equi.evaluation.dense.training import LoopSettings
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.layers.batch_norm import BatchNorm2d

LINEAR, MULTISCALE = "linear", "multiscale"
HEADS = {LINEAR: 1, MULTISCALE: 4}
"""How many of the last blocks each head reads."""


@dataclass(frozen=True)
class SegmentationSettings(LoopSettings):
    """What is trained, how, and how it is measured; with the attributes of `LoopSettings`.

    Attributes:
        heads: names that `head` may have.
        head: linear (last block) or multiscale (last four blocks): batch norm and a linear layer.
        finetune: train the backbone too.
        resize: shorter side to which images are resized, pixels.
        crop: side of the training crops and of the windows of the prediction, pixels.
        stride: from one window of the prediction to the next, pixels.
        least_scale: least factor by which a training image is resized further.
        largest_scale: largest factor.
        photometric: change brightness, contrast and colours of training images.
        test_scales: factors of the size at which an image is predicted; the shares of the classes are averaged.
        flip_test: predict the mirrored image too.
    """

    heads: ClassVar[tuple[str, ...]] = tuple(HEADS)
    head: str = LINEAR
    finetune: bool = False
    resize: int = 512
    crop: int = 512
    stride: int = 341
    least_scale: float = 0.5
    largest_scale: float = 2.0
    photometric: bool = True
    test_scales: tuple[float, ...] = (1.0,)
    flip_test: bool = False
    steps: int = 40000
    lr: float = 1e-3
    warmup_steps: int = 1500
    save_every: int = 500

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.head not in self.heads:
            raise ValueError(f"expected head to be one of {', '.join(self.heads)}, got {self.head!r}")
        if self.resize < 1 or not 1 <= self.stride <= self.crop:
            raise ValueError(
                f"expected resize >= 1 and 1 <= stride <= crop, got {self.resize}, {self.stride}, {self.crop}"
            )
        if not 0 < self.least_scale <= self.largest_scale or min(self.test_scales) <= 0:
            raise ValueError(
                f"expected 0 < least_scale <= largest_scale and test_scales > 0, got {self.least_scale}, "
                f"{self.largest_scale}, {self.test_scales}"
            )
        super().check()


class SegmentationModel(nn.Module):
    """A backbone with a batch norm and a linear layer on its patch tokens.

    Args:
        model: the backbone.
        settings: which blocks.
        num_classes: C.

    Source: the linear evaluation of Oquab et al. 2023 (DINOv2, arXiv 2304.07193), section 7.4.
    """

    def __init__(self, model: EvalModel, settings: SegmentationSettings, num_classes: int) -> None:
        super().__init__()
        blocks = last_blocks(model, HEADS[settings.head])
        self.features = DenseBackbone(model, blocks, is_frozen=not settings.finetune)
        width = sum(patches for patches, _ in self.features.widths())
        classify = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(classify.weight, std=0.01)
        nn.init.zeros_(classify.bias)  # type: ignore[arg-type]
        self.head = nn.Sequential(BatchNorm2d(width, has_running_stats=True), classify)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C, H, W] of images [B, 3, H, W] in [0, 1]."""
        maps = torch.cat([block.patches for block in self.features(images)], dim=1)  # [B, n * D, h, w]
        return to_image_size(self.head(maps), images.shape[-2:], self.features.patch_size)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the `pixel_cross_entropy`.

        Args:
            images: [B, 3, H, W] in [0, 1].
            labels: int64 [B, 1, H, W], `IGNORE` where there is no class.
        """
        return pixel_cross_entropy(self(images), labels.squeeze(1))

    @torch.no_grad()
    def predict(self, image: Tensor, settings: SegmentationSettings) -> Tensor:
        """Return the classes, int64 [1, H, W] on the CPU, of an image, uint8 [3, H, W].

        At every scale the logits of overlapping windows are averaged, then stretched to the size of the image; the
        shares of the classes (softmax) are averaged over scales and mirrored images.
        """
        device = next(self.head.parameters()).device
        size = image.shape[-2:]
        shares = torch.zeros((), device=device)
        for scale in settings.test_scales:
            batch = resized_for_test(image.to(device), settings, scale)[None]
            for is_mirrored in (False, True) if settings.flip_test else (False,):
                given = batch.flip(-1) if is_mirrored else batch
                logits = sliding_window(self, given, window=settings.crop, stride=settings.stride)
                logits = logits.flip(-1) if is_mirrored else logits
                full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
                shares = shares + full.softmax(dim=1)
        return shares.argmax(dim=1).cpu()


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the pixels of all processes that have a class; 0 where none has.

    Args:
        logits: [B, C, H, W].
        labels: int64 [B, H, W], `IGNORE` where there is no class.
    """
    total = sum_over_ranks(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
    return total / all_reduce_sum_((labels != IGNORE).sum()).clamp_min(1)


def resized_for_test(image: Tensor, settings: SegmentationSettings, scale: float) -> Tensor:
    """Return an image, uint8 [3, H, W], in the size at which it is predicted, [3, h, w] in [0, 1].

    Args:
        image: on any device.
        settings: the shorter side.
        scale: factor of it, one of the `test_scales`.
    """
    side = max(round(settings.resize * scale), 1)
    resized = v2.functional.resize(image, [side], antialias=True)
    scaled: Tensor = v2.functional.to_dtype(resized, torch.float32, scale=True)
    return scaled


class SegmentationSample(NamedTuple):
    """A training crop; stacked by torch's own collation."""

    image: Tensor
    """[3, S, S] float32 in [0, 1]."""

    labels: Tensor
    """int64 [1, S, S], `IGNORE` where there is no class."""


class SegmentationAugmentation:
    """Makes a training crop: resized, cropped, mirrored, recoloured.

    Args:
        settings: of the task.
        dataset: the images.
    """

    def __init__(self, settings: SegmentationSettings, dataset: SegmentationSet) -> None:
        self._dataset = dataset
        least, largest = (round(settings.resize * s) for s in (settings.least_scale, settings.largest_scale))
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
        steps: list[nn.Module] = [
            v2.RandomResize(least, largest + 1, antialias=True),  # the upper end is left out
            v2.RandomCrop(settings.crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
        ]
        if settings.photometric:
            steps.append(v2.RandomPhotometricDistort())
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        self._transform = v2.Compose(steps)

    def __call__(self, index: int) -> SegmentationSample:
        """Return a crop of an image, with torch's random numbers."""
        image, labels = self._dataset.load(index)
        crop, found = self._transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return SegmentationSample(crop.as_subclass(Tensor), found.as_subclass(Tensor))


def evaluate_segmentation(
    model: SegmentationModel,
    dataset: SegmentationSet,
    settings: SegmentationSettings,
    *,
    on_image: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Return the measures of `ConfusionMatrix` over all images at their own size, and `num_images`.

    Every process of a group must call it; each predicts its share of the images.
    """
    model.eval()
    matrix = ConfusionMatrix(len(dataset.classes), IGNORE)
    for index in share_of_rank(len(dataset)):
        image, labels = dataset.load(index)
        matrix.add(model.predict(image, settings), labels)
        if on_image is not None:
            on_image()
    matrix.counts = all_reduce_sum_(matrix.counts.to(next(model.head.parameters()).device)).cpu()
    return matrix.results(dataset.classes) | {"num_images": len(dataset)}
