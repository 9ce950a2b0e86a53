"""Samples to batches."""

from __future__ import annotations

import torch

from dinov2_equi.data.augmentations import Crops
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.collate import MaskRecipe, Sample, collate, join
from dinov2_equi.data.masking import MaskingGenerator

GRID = (3, 5)


def make_batch(
    first_position: int = 40, num_images: int = 4, num_local: int = 3, probability: float = 0.5, seed: int = 0
) -> Batch:
    """Crop c of the image at position p holds the value 100 p + c; local crops count on from 10."""
    samples = []
    for position in range(first_position, first_position + num_images):
        global_crops = torch.stack([torch.full((3, 12, 20), 100.0 * position + crop) for crop in range(2)])
        local_crops = torch.empty(num_local, 3, 4, 8)
        for crop in range(num_local):
            local_crops[crop] = 100.0 * position + 10 + crop
        samples.append(Sample(Crops(global_crops, local_crops), position))
    # One step, or the end of a larger one.
    step_size = num_images if first_position % num_images == 0 else first_position + num_images
    return collate(samples, MaskRecipe(MaskingGenerator(GRID), probability, (0.3, 0.6), seed, step_size))


def test_crops_are_crop_major() -> None:
    batch = make_batch(first_position=1, num_images=3)
    assert batch.global_crops.shape == (6, 3, 12, 20)
    assert batch.local_crops.shape == (9, 3, 4, 8)
    assert batch.global_crops[:, 0, 0, 0].tolist() == [100, 200, 300, 101, 201, 301]
    assert batch.local_crops[:, 2, 3, 7].tolist() == [110, 210, 310, 111, 211, 311, 112, 212, 312]
    assert batch.positions.tolist() == [1, 2, 3]
    assert (batch.batch_size, batch.num_local_crops) == (3, 3)
    assert batch.positions.dtype == batch.mask_indices.dtype == torch.int64
    assert batch.masks.dtype == torch.bool


def test_no_local_crops_give_an_empty_tensor_of_the_right_shape() -> None:
    batch = make_batch(num_local=0)
    assert batch.local_crops.shape == (0, 3, 4, 8)
    assert batch.num_local_crops == 0


def test_indices_and_weights_equal_the_loop() -> None:
    for seed in range(5):
        batch = make_batch(num_images=5, seed=seed)
        num_patches = GRID[0] * GRID[1]
        indices, weights = [], []
        for crop, mask in enumerate(batch.masks.tolist()):
            for patch, is_masked in enumerate(mask):
                if is_masked:
                    indices.append(crop * num_patches + patch)
                    weights.append(1 / sum(mask))
        assert batch.masks.shape == (10, num_patches)
        assert len(indices) > 0
        assert batch.mask_indices.tolist() == indices
        assert torch.equal(batch.mask_weights, torch.tensor(weights))


def test_weights_of_each_masked_crop_sum_to_1() -> None:
    batch = make_batch(num_images=8)
    sums = torch.zeros(16).index_add(0, batch.mask_indices // 15, batch.mask_weights)
    assert torch.allclose(sums, batch.masks.any(1).float())
    assert batch.masks.any(1).sum() == 8


def test_probability_0_gives_empty_indices_and_weights() -> None:
    batch = make_batch(probability=0.0)
    assert not batch.masks.any()
    assert batch.mask_indices.shape == batch.mask_weights.shape == (0,)
    assert batch.mask_weights.dtype == torch.float32


def test_masks_depend_on_seed_and_first_position_alone() -> None:
    assert torch.equal(make_batch(seed=1).masks, make_batch(seed=1, num_local=0).masks)
    assert not torch.equal(make_batch(seed=1).masks, make_batch(seed=2).masks)
    assert not torch.equal(make_batch(40).masks, make_batch(44).masks)


def test_joined_batches_of_ranks_are_another_batch_than_one_process_gets() -> None:
    masks = MaskRecipe(MaskingGenerator(GRID), 0.5, (0.3, 0.6), seed=0, step_size=6)
    samples = [
        Sample(Crops(torch.full((2, 3, 12, 20), float(image)), torch.full((3, 3, 4, 8), image + 0.5)), 12 + image)
        for image in range(6)
    ]
    whole, parts = collate(samples, masks), [collate(samples[first : first + 2], masks) for first in (0, 2, 4)]
    joined = join(parts).tensors()
    assert len(joined["mask_indices"]) > 0
    assert all(torch.equal(tensor, joined[name]) for name, tensor in whole.tensors().items())
