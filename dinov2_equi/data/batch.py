"""What one training step receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dinov2_equi.data.bad_images import BadImage


@dataclass(frozen=True)
class Batch:
    """Crops and masks of B images, with G global and L local crops each. Crops are in [0, 1], not normalised."""

    global_crops: Tensor
    """float32 [G*B, 3, H, W], crop-major: first crops of all images, then all second crops."""

    local_crops: Tensor
    """float32 [L*B, 3, h, w], crop-major; [0, 3, h, w] without local crops."""

    masks: Tensor
    """bool [G*B, N], True where a patch of a global crop is masked."""

    mask_indices: Tensor
    """int64 [M], the masked patches as increasing indices into `masks.flatten()`."""

    mask_weights: Tensor
    """float32 [M], 1 / (number of masked patches of the same crop)."""

    positions: Tensor
    """int64 [B], place of each image in the order of the whole training."""

    bad_images: tuple[BadImage, ...] = ()
    """Images that others in the batch stand in for."""

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return len(self.positions)

    @property
    def num_local_crops(self) -> int:
        """Number of local crops of one image, L."""
        return len(self.local_crops) // self.batch_size

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on `device`, but `positions`, which only seed random draws on the CPU.

        Args:
            device: Where to.
            non_blocking: Copy from pinned memory without waiting for the copy.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, positions=self.positions)

    def pin_memory(self) -> Batch:
        """Return the batch with every tensor in page-locked memory (the loader calls this; needs an accelerator)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(bad_images=self.bad_images, **{name: function(part) for name, part in self.tensors().items()})
