"""The crops of a whole batch at once, on any device: what `augmentations.make_crop` does to one image at a time.

The random choices are made on the CPU as ever, so that both ways show the same crops, up to rounding: here nothing is
rounded to 8 bits after the resizing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dinov2_equi.data.augmentations import BLUR_KERNEL_PX, SOLARIZE_THRESHOLD, CropParams
from dinov2_equi.data.color import (
    adjust_brightness,
    adjust_contrast_,
    adjust_hue,
    adjust_saturation_,
    blur_each_along,
    gaussian_kernels,
    luma,
)

_BICUBIC_A = -0.5  # Pillow's and torchvision's with antialiasing
_BICUBIC_REACH = 2.0  # pixels of the coarser of the two grids

ColorOperation = Callable[[Tensor, Tensor], Tensor]
"""Of crops [b, 3, H, W] in [0, 1], which it may change, and one amount each, [b]; returns the changed crops."""


# ------------------------------------------------------------------------------------------------------ what to do


@dataclass(frozen=True)
class CropPlan:
    """What to do for C crops of each of B images, crop-major: first crops of all images first."""

    size: tuple[int, int]
    """(H, W) of the crops in pixels."""
    boxes: Tensor
    """float32 [C*B, 4]: top, left, height, width of the cut-out in its source, in pixels."""
    is_flipped: Tensor
    """bool [C*B]."""
    rows: Tensor
    """int64 [R]: the crops that the colour operations change, for one operation of `_STEPS` after the other."""
    amounts: Tensor
    """float32 [R]: how much each is changed."""
    counts: tuple[int, ...]
    """Number of crops that each operation of `_STEPS` changes; R together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CropPlan:
        """Return the plan with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CropPlan:
        """Return the plan with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> CropPlan:
        return replace(
            self,
            boxes=function(self.boxes),
            is_flipped=function(self.is_flipped),
            rows=function(self.rows),
            amounts=function(self.amounts),
        )


def plan_crops(choices: Sequence[Sequence[CropParams]], size: tuple[int, int]) -> CropPlan:
    """Return the plan for the choices of B images with C crops each."""
    crop_major = [params for crops in zip(*choices, strict=True) for params in crops]
    rows: list[int] = []
    amounts: list[float] = []
    counts: list[int] = []
    for step in _STEPS:
        changed = [
            (row, amount) for row, params in enumerate(crop_major) if (amount := step.amount(params)) is not None
        ]
        rows += [row for row, _ in changed]
        amounts += [amount for _, amount in changed]
        counts.append(len(changed))
    return CropPlan(
        size=size,
        boxes=torch.tensor([params.box for params in crop_major], dtype=torch.float32).reshape(-1, 4),
        is_flipped=torch.tensor([params.is_flipped for params in crop_major], dtype=torch.bool),
        rows=torch.tensor(rows, dtype=torch.int64),
        amounts=torch.tensor(amounts, dtype=torch.float32),
        counts=tuple(counts),
    )


# -------------------------------------------------------------------------------------------------------- doing it


def make_crops(sources: Tensor, plan: CropPlan) -> Tensor:
    """Return the crops of a batch as float32 [C*B, channels, H, W] in [0, 1], crop-major, on the device of `sources`.

    Args:
        sources: uint8 [B, 3, h, w], or float32 [B, channels, h, w] in [0, 1]; an image smaller than that lies at the
            top left, what is beside it is never seen.
        plan: What to do, on the same device.
    """
    crops = _resized_crops(sources, plan)
    parts = zip(_STEPS, plan.rows.split(plan.counts), plan.amounts.split(plan.counts), plan.counts, strict=True)
    for step, rows, amounts, count in parts:
        if count:
            crops.index_copy_(0, rows, step.operation(crops.index_select(0, rows), amounts))
    return crops


def _resized_crops(sources: Tensor, plan: CropPlan) -> Tensor:
    """Return all cut-outs, resized and flipped: two matrix products for the C-th crops of all images."""
    num_images, num_channels, source_height, source_width = sources.shape
    images = sources if sources.is_floating_point() else sources.to(torch.float32).div_(255.0)
    crops = images.new_empty(len(plan.boxes), num_channels, *plan.size)
    for start in range(0, len(crops), num_images):
        crop = slice(start, start + num_images)
        top, left, height, width = plan.boxes[crop].unbind(dim=1)
        down = resize_weights(top, height, source_height, plan.size[0])  # [B, H, h]
        across = resize_weights(left, width, source_width, plan.size[1])  # [B, W, w]
        across = torch.where(plan.is_flipped[crop, None, None], across.flip(1), across)
        crops[crop] = down.unsqueeze(1) @ images @ across.transpose(1, 2).unsqueeze(1)  # [B, 3, H, W]
    return crops.clamp_(0, 1)


def resize_weights(start: Tensor, extent: Tensor, source_side: int, side: int) -> Tensor:
    """Return the bicubic, antialiased resizing of a stretch of a line as matrices [n, side, source_side].

    A row holds the weights of the source's pixels in one pixel of the result, and sums to 1; pixels outside the stretch
    have none. Same weights as Pillow's.

    Args:
        start: First pixel of the stretch, [n].
        extent: Its pixels, >= 1, [n].
        source_side: Pixels of the source's line.
        side: Pixels of the result.
    """
    start, extent = start[:, None, None], extent[:, None, None]
    pixels = torch.arange(source_side, device=start.device, dtype=torch.float32) + 0.5  # centres
    centres = torch.arange(side, device=start.device, dtype=torch.float32)[:, None] + 0.5
    step = extent / side
    distances = (pixels - (start + centres * step)) / step.clamp_min(1.0)  # [n, side, source_side]
    weights = _bicubic(distances.abs_()).masked_fill_((pixels < start) | (pixels > start + extent), 0.0)
    return weights / weights.sum(dim=2, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Return Keys' cubic convolution kernel of distances >= 0."""
    near = ((_BICUBIC_A + 2) * x - (_BICUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _BICUBIC_A
    return torch.where(x < 1, near, torch.where(x < _BICUBIC_REACH, far, 0.0))


# --------------------------------------------------------------------------------------------------------- colours


@dataclass(frozen=True)
class _ColorStep:
    """One operation, and how much of it a crop gets (None: it is left alone)."""

    operation: ColorOperation
    amount: Callable[[CropParams], float | None]


def _jitter_step(place: int, number: int, operation: ColorOperation, name: str) -> _ColorStep:
    """Return the operation that is number `number` of `ColorJitter.order`, for the crops that have it at `place`."""

    def amount(params: CropParams) -> float | None:
        jitter = params.jitter
        if jitter is None or jitter.order[place] != number:
            return None
        value: float = getattr(jitter, name)
        return None if value == _NEUTRAL[number] else value

    return _ColorStep(operation, amount)


def _per_image(operation: Callable[[Tensor, Tensor], Tensor]) -> ColorOperation:
    return lambda crops, amounts: operation(crops, amounts[:, None, None, None])


def _blur(crops: Tensor, sigma: Tensor) -> Tensor:
    for dim in (-1, -2):
        radius = min(BLUR_KERNEL_PX // 2, crops.shape[dim] - 1)  # a short side has less to mirror
        crops = blur_each_along(crops, gaussian_kernels(sigma, radius), dim)
    return crops


def _solarize(crops: Tensor, _: Tensor) -> Tensor:
    return torch.where(crops >= SOLARIZE_THRESHOLD, 1 - crops, crops)


_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
"""Amounts that change nothing, in the order of `_JITTER`: channels without colours have no saturation and no hue."""
_JITTER: tuple[tuple[ColorOperation, str], ...] = (
    (_per_image(adjust_brightness), "brightness"),
    (_per_image(adjust_contrast_), "contrast"),
    (_per_image(adjust_saturation_), "saturation"),
    (lambda crops, amounts: adjust_hue(crops, amounts[:, None, None]), "hue"),
)
_STEPS = (
    *(
        _jitter_step(place, number, operation, name)
        for place in range(len(_JITTER))
        for number, (operation, name) in enumerate(_JITTER)
    ),
    _ColorStep(lambda crops, _: luma(crops).expand_as(crops), lambda params: 1.0 if params.is_gray else None),
    _ColorStep(_blur, lambda params: params.blur_sigma),
    _ColorStep(_solarize, lambda params: 1.0 if params.is_solarized else None),
)
"""All colour operations in the order in which they are applied: four of jitter, each at each of four places, then grey,
blur and solarisation. So a whole batch needs no more calls than this, whatever the orders that were drawn."""
