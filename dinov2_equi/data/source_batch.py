"""A batch that is cropped on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dinov2_equi.data.bad_images import BadImage
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.device_augmentation import CropPlan, make_crops


@dataclass(frozen=True)
class SourceBatch:
    """B images, and what a `Batch` of them needs: which crops to make, and the masks."""

    sources: Tensor
    """uint8 [B, 3, H, W], or float32 [B, C, H, W] in [0, 1]; a smaller image lies at the top left."""
    global_plan: CropPlan
    local_plan: CropPlan
    masks: Tensor
    """See `Batch`, as for the next four."""
    mask_indices: Tensor
    mask_weights: Tensor
    positions: Tensor
    bad_images: tuple[BadImage, ...] = ()

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return len(self.positions)

    def make_crops(self) -> Batch:
        """Return the batch with its crops, made on the device of the images."""
        return Batch(
            global_crops=make_crops(self.sources, self.global_plan),
            local_crops=make_crops(self.sources, self.local_plan),
            masks=self.masks,
            mask_indices=self.mask_indices,
            mask_weights=self.mask_weights,
            positions=self.positions,
            bad_images=self.bad_images,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SourceBatch:
        """Return the batch with everything on `device` but `positions`, as `Batch.to` does."""
        moved = self._map(lambda part: part.to(device, non_blocking=non_blocking))
        return replace(moved, positions=self.positions)

    def pin_memory(self) -> SourceBatch:
        """Return the batch with every tensor in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> SourceBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["bad_images"]
        return replace(self, **{name: function(value) for name, value in values.items()})
