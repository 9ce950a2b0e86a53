"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_equi.data.augmentations import Choices, Crops
from dinov2_equi.data.bad_images import BadImage
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.device_augmentation import plan_crops
from dinov2_equi.data.masking import MaskingGenerator, draw_mask_sizes
from dinov2_equi.data.samplers import RandomStream, random_generator
from dinov2_equi.data.source_batch import SourceBatch


@dataclass(frozen=True)
class Sample:
    """The crops of one image, and its place in the order of the whole training."""

    crops: Crops
    position: int
    bad_images: tuple[BadImage, ...] = ()
    """Images that should have stood here and cannot be used."""


@dataclass(frozen=True)
class SourceSample:
    """An image, what to crop from it, and its place in the order of the whole training."""

    source: Tensor
    """uint8 [3, H, W], or float32 [C, H, W] in [0, 1]."""
    choices: Choices
    position: int
    bad_images: tuple[BadImage, ...] = ()
    """See `Sample`."""


@dataclass(frozen=True)
class MaskRecipe:
    """How the masks of a step are drawn: functions of the seed and of the images that all ranks take in it."""

    generator: MaskingGenerator
    """Makes the masks; its grid must be that of the global crops."""
    probability: float
    """Share of the global crops of a step that get a mask."""
    ratio_min_max: tuple[float, float]
    """Least and greatest share of masked patches in such a crop."""
    seed: int
    """Seed of the run."""
    step_size: int
    """Images of all ranks in a step."""

    def draw(self, positions: Sequence[int], num_crops: int) -> dict[str, Tensor]:
        """Return `masks`, `mask_indices` and `mask_weights` of `Batch` for `num_crops` global crops of each image."""
        first = positions[0] // self.step_size * self.step_size  # of the step
        rng = random_generator(RandomStream.MASKS, self.seed, first)
        num_patches = self.generator.num_patches
        sizes = draw_mask_sizes(num_crops * self.step_size, num_patches, self.probability, self.ratio_min_max, rng)
        masks = torch.zeros(num_crops, len(positions), num_patches, dtype=torch.bool)  # [G, B, N]
        for crop in range(num_crops):
            for image, position in enumerate(positions):
                if size := int(sizes[crop * self.step_size + position - first]):
                    masks[crop, image] = torch.from_numpy(self._shape(size, position * num_crops + crop)).flatten()
        masks = masks.flatten(0, 1)  # [G*B, N]
        return {"masks": masks, "mask_indices": masks.flatten().nonzero().flatten(), "mask_weights": _weights(masks)}

    def _shape(self, size: int, crop_number: int) -> npt.NDArray[np.bool_]:
        return self.generator(size, random_generator(RandomStream.MASK_SHAPES, self.seed, crop_number))


def collate(samples: Sequence[Sample], masks: MaskRecipe) -> Batch:
    """Return a batch of one or more samples with equal numbers and sizes of crops."""
    global_crops = _stack_crop_major([sample.crops.global_crops for sample in samples])
    return Batch(
        global_crops=global_crops,
        local_crops=_stack_crop_major([sample.crops.local_crops for sample in samples]),
        positions=_positions(samples),
        bad_images=_bad_images(samples),
        **masks.draw([sample.position for sample in samples], len(global_crops) // len(samples)),
    )


def collate_sources(
    samples: Sequence[SourceSample], masks: MaskRecipe, *, global_size: tuple[int, int], local_size: tuple[int, int]
) -> SourceBatch:
    """Return a batch of one or more images, of any sizes, that is still to be cropped to (H, W) pixels."""
    global_plan = plan_crops([sample.choices.global_crops for sample in samples], global_size)
    return SourceBatch(
        sources=_pad_to_largest([sample.source for sample in samples]),
        global_plan=global_plan,
        local_plan=plan_crops([sample.choices.local_crops for sample in samples], local_size),
        positions=_positions(samples),
        bad_images=_bad_images(samples),
        **masks.draw([sample.position for sample in samples], len(samples[0].choices.global_crops)),
    )


def _positions(samples: Sequence[Sample] | Sequence[SourceSample]) -> Tensor:
    return torch.tensor([sample.position for sample in samples], dtype=torch.int64)


def _bad_images(samples: Sequence[Sample] | Sequence[SourceSample]) -> tuple[BadImage, ...]:
    return tuple(image for sample in samples for image in sample.bad_images)


def _pad_to_largest(images: Sequence[Tensor]) -> Tensor:
    """Return [B, C, H, W] with each image at the top left, as high and wide as the highest and the widest."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    padded = images[0].new_zeros(len(images), len(images[0]), height, width)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _stack_crop_major(crops: Sequence[Tensor]) -> Tensor:
    """Return [C*B, 3, H, W] from [C, 3, H, W] of each of B images: first crops of all images first."""
    return torch.stack(list(crops), dim=1).flatten(0, 1)  # [C, B, 3, H, W] -> [C*B, 3, H, W]


def _weights(masks: Tensor) -> Tensor:
    """Return float32 [M]: for each masked patch, in the order of `masks`, 1 / (masked patches of its crop)."""
    num_masked = masks.sum(dim=1)  # [G*B]
    return num_masked.clamp(min=1).float().reciprocal().repeat_interleave(num_masked)
