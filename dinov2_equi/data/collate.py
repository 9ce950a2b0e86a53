"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_equi.data.augmentations import Crops
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.masking import MaskingGenerator, draw_masks
from dinov2_equi.data.samplers import RandomStream, random_generator


@dataclass(frozen=True)
class Sample:
    """The crops of one image, and its place in the order of the whole training."""

    crops: Crops
    position: int


def collate(
    samples: Sequence[Sample],
    *,
    mask_generator: MaskingGenerator,
    mask_probability: float,
    mask_ratio_min_max: tuple[float, float],
    seed: int,
) -> Batch:
    """Return a batch of the samples, with masks that depend on (seed, position of the first sample) alone.

    Args:
        samples: One or more, with equal numbers and sizes of crops.
        mask_generator: Makes the masks; its grid must be that of the global crops.
        mask_probability: Share of the global crops that get a mask.
        mask_ratio_min_max: Least and greatest share of masked patches in such a crop.
        seed: Seed of the run.
    """
    global_crops = _stack_crop_major([sample.crops.global_crops for sample in samples])
    rng = random_generator(RandomStream.MASKS, seed, samples[0].position)
    masks = torch.from_numpy(
        draw_masks(mask_generator, len(global_crops), mask_probability, mask_ratio_min_max, rng)
    )  # [G*B, N]
    return Batch(
        global_crops=global_crops,
        local_crops=_stack_crop_major([sample.crops.local_crops for sample in samples]),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=_mask_weights(masks),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
    )


def _stack_crop_major(crops: Sequence[Tensor]) -> Tensor:
    """Return [C*B, 3, H, W] from [C, 3, H, W] of each of B images: first crops of all images first."""
    return torch.stack(list(crops), dim=1).flatten(0, 1)  # [C, B, 3, H, W] -> [C*B, 3, H, W]


def _mask_weights(masks: Tensor) -> Tensor:
    """Return float32 [M]: for each masked patch, in the order of `masks`, 1 / (masked patches of its crop)."""
    num_masked = masks.sum(dim=1)  # [G*B]
    return num_masked.clamp(min=1).float().reciprocal().repeat_interleave(num_masked)
