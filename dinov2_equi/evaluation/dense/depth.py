"""Monocular depth on a backbone: training of a head and its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov2_equi.data.datasets.depth_sets import DepthSet
from dinov2_equi.distributed.collectives import gather_values
from dinov2_equi.distributed.env import share_of_rank
from dinov2_equi.evaluation.dense.depth_heads import (
    DPT,
    HEADS,
    LINEAR,
    DepthBins,
    DepthOutput,
    DPTDepthHead,
    LinearDepthHead,
)
from dinov2_equi.evaluation.dense.depth_metrics import (
    MeanOfImages,
    bins_loss,
    depth_metrics,
    gradient_loss,
    silog_loss,
)
from dinov2_equi.evaluation.dense.maps import DenseBackbone, last_blocks, spaced_blocks, to_image_size
from dinov2_equi.evaluation.dense.training import LoopSettings, Losses
from dinov2_equi.evaluation.eval_model import EvalModel


@dataclass(frozen=True)
class DepthSettings(LoopSettings):
    """What is trained, how, and how it is measured; with the attributes of `LoopSettings`.

    Attributes:
        head: linear (last block), linear4 (four blocks, evenly spaced), or dpt.
        finetune: train the backbone too.
        bins: number of depth bins.
        dpt_channels: width of the DPT decoder.
        silog_weight: of the scale-invariant logarithmic loss.
        gradient_weight: of the loss of the slopes of log depth, DINOv2's.
        bins_weight: of the cross-entropy over the bins.
        height: of the crops that are trained on, pixels; images smaller than it are filled up.
        width: of the crops.
        resize: shorter side to which images are resized before the crop, and before the prediction; 0: not resized.
        rotate_deg: largest rotation of a training image.
        color_jitter: strength of the change of brightness, contrast and colours.
        flip_test: average the prediction with that of the mirrored image.
    """

    head: str = LINEAR
    finetune: bool = False
    bins: int = 256
    dpt_channels: int = 256
    silog_weight: float = 1.0
    gradient_weight: float = 0.5
    bins_weight: float = 0.0
    height: int = 416
    width: int = 544
    resize: int = 0
    rotate_deg: float = 2.5
    color_jitter: float = 0.1
    flip_test: bool = True
    steps: int = 38400
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    layer_decay: float = 0.75
    clip_grad: float = 35.0
    save_every: int = 500

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.head not in HEADS:
            raise ValueError(f"expected head to be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.bins < 2 or self.dpt_channels < 1 or min(self.height, self.width) < 1 or self.resize < 0:
            raise ValueError(
                f"expected bins >= 2, dpt_channels >= 1, height and width >= 1, resize >= 0; got {self.bins}, "
                f"{self.dpt_channels}, {self.height}, {self.width}, {self.resize}"
            )
        weights = (self.silog_weight, self.gradient_weight, self.bins_weight)
        if min(weights) < 0 or self.silog_weight + self.bins_weight == 0:
            raise ValueError(
                "expected silog_weight, gradient_weight and bins_weight >= 0, and the first or the last above 0, as "
                f"slopes alone leave the depth open; got {', '.join(map(str, weights))}"
            )
        super().check()


class DepthModel(nn.Module):
    """A backbone with a head that reads depth.

    Args:
        model: the backbone.
        settings: which head.
        min_depth: least depth, metres.
        max_depth: greatest depth, metres.
    """

    def __init__(self, model: EvalModel, settings: DepthSettings, min_depth: float, max_depth: float) -> None:
        super().__init__()
        blocks = last_blocks(model, 1) if settings.head == LINEAR else spaced_blocks(model, 4)
        self.features = DenseBackbone(model, blocks, is_frozen=not settings.finetune)
        self.min_depth, self.max_depth = min_depth, max_depth
        bins = DepthBins(settings.bins, min_depth, max_depth)
        widths = self.features.widths()
        self.head: nn.Module = (
            DPTDepthHead(widths, bins, settings.bins, channels=settings.dpt_channels)
            if settings.head == DPT
            else LinearDepthHead(widths, bins, settings.bins)
        )

    def forward(self, images: Tensor) -> DepthOutput:
        """Return depth [B, 1, H, W] and shares of the bins [B, K, h, w] of images [B, 3, H, W] in [0, 1]."""
        found: DepthOutput = self.head(self.features(images))
        depth = to_image_size(found.depth, images.shape[-2:], self.features.patch_size)
        return DepthOutput(depth.clamp(self.min_depth, self.max_depth), found.shares)

    def losses(self, images: Tensor, depth: Tensor, known: Tensor, settings: DepthSettings) -> Losses:
        """Return the terms of the loss, weighted.

        Args:
            images: [B, 3, H, W] in [0, 1].
            depth: [B, 1, H, W] metres.
            known: bool [B, 1, H, W].
            settings: the weights.
        """
        found = self(images)
        terms = {}
        if settings.silog_weight:
            terms["silog_loss"] = settings.silog_weight * silog_loss(found.depth, depth, known)
        if settings.gradient_weight:
            terms["gradient_loss"] = settings.gradient_weight * gradient_loss(found.depth, depth, known)
        if settings.bins_weight:
            shares = to_image_size(found.shares, images.shape[-2:], self.features.patch_size)
            terms["bins_loss"] = settings.bins_weight * bins_loss(shares, self.head.bins.centres, depth, known)  # type: ignore[union-attr, arg-type]
        return terms

    @torch.no_grad()
    def predict(self, image: Tensor, settings: DepthSettings) -> Tensor:
        """Return the depth [1, H, W] in metres of an image, uint8 [3, H, W] on any device."""
        device = self.head.bins.centres.device  # type: ignore[union-attr]
        batch = v2.functional.to_dtype(_resized(image, settings.resize), torch.float32, scale=True)[None].to(device)
        depth: Tensor = self(batch).depth
        if settings.flip_test:
            depth = (depth + self(batch.flip(-1)).depth.flip(-1)) / 2
        full: Tensor = v2.functional.resize_image(depth, list(image.shape[-2:]), antialias=False)
        return full[0].clamp(self.min_depth, self.max_depth)


def _resized(image: Tensor, side: int) -> Tensor:
    """Return an image [3, H, W] whose shorter side has this many pixels; 0: as it is."""
    return image if side == 0 else v2.functional.resize(image, [side], antialias=True)


class DepthSample(NamedTuple):
    """A training crop; stacked by torch's own collation."""

    image: Tensor
    """[3, H, W] float32 in [0, 1]."""

    depth: Tensor
    """[1, H, W] metres."""

    known: Tensor
    """bool [1, H, W]: in range. The crop of the measurement plays no part in training."""


class DepthAugmentation:
    """Makes a training crop: rotated, cropped, mirrored, recoloured.

    Args:
        settings: of the task.
        dataset: its range of depth says what is known.
    """

    def __init__(self, settings: DepthSettings, dataset: DepthSet) -> None:
        self._dataset = dataset
        self._resize = settings.resize
        size, jitter = (settings.height, settings.width), settings.color_jitter
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: 0}
        steps: list[nn.Module] = []
        if settings.rotate_deg > 0:
            steps.append(v2.RandomRotation(settings.rotate_deg, v2.InterpolationMode.BILINEAR, fill=fill))
        steps.append(v2.RandomCrop(size, pad_if_needed=True, fill=fill))
        steps.append(v2.RandomHorizontalFlip())
        if jitter > 0:
            steps.append(v2.ColorJitter(jitter, jitter, jitter, jitter / 2))
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        self._transform = v2.Compose(steps)

    def __call__(self, index: int) -> DepthSample:
        """Return a crop of an image, with torch's random numbers."""
        image, depth = self._dataset.load(index)
        image = _resized(image, self._resize)
        if depth.shape[-2:] != image.shape[-2:]:
            depth = v2.functional.resize_mask(depth, list(image.shape[-2:]))
        crop, found = self._transform(tv_tensors.Image(image), tv_tensors.Mask(depth))
        depth = found.as_subclass(Tensor)
        known = (depth > self._dataset.min_depth) & (depth < self._dataset.max_depth)
        return DepthSample(crop.as_subclass(Tensor), depth, known)


def evaluate_depth(
    model: DepthModel, dataset: DepthSet, settings: DepthSettings, *, on_image: Callable[[], None] | None = None
) -> dict[str, float]:
    """Return the mean over images of every measure of `METRICS`, and `num_images`.

    An image without a measured pixel does not count. Every process of a group must call it; each predicts its share of
    the images.

    Raises:
        ValueError: none of the images counts.
    """
    model.eval()
    mean = MeanOfImages(dataset.name(0))
    for index in share_of_rank(len(dataset)):
        image, truth = dataset.load(index)
        measured = dataset.is_measured(truth)
        if measured.any():
            mean.add(depth_metrics(model.predict(image, settings)[0].cpu(), truth[0], measured[0]))
        if on_image is not None:
            on_image()
    return mean.result(next(model.head.parameters()).device)


def constant_depth_metrics(train: DepthSet, val: DepthSet, device: torch.device | str = "cpu") -> dict[str, float]:
    """Return the measures of a prediction that is the mean depth of the training set everywhere: what to beat.

    Every process of a group must call it; each reads its share of the images.

    Args:
        train: whose mean is taken over all known pixels.
        val: what is measured.
        device: where the process group communicates.
    """
    sums = []
    for index in share_of_rank(len(train)):
        _, depth = train.load(index)
        known = depth[(depth > train.min_depth) & (depth < train.max_depth)].double()
        sums.append((float(known.sum()), known.numel()))
    total, count = (math.fsum(part) for part in zip(*chain(*gather_values(sums, device)), strict=True))
    if not count:
        raise ValueError(
            f"expected training images with known depth, got none, {train.name(0)} the first of them; look at the "
            "depth maps, units_per_metre and max_depth"
        )
    mean = MeanOfImages(val.name(0))
    for index in share_of_rank(len(val)):
        _, truth = val.load(index)
        measured = val.is_measured(truth)
        if measured.any():
            mean.add(depth_metrics(torch.full_like(truth[0], total / count), truth[0], measured[0]))
    return mean.result(device)
