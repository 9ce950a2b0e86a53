"""Crops of a whole batch on the device against those that the CPU makes one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_equi.data.augmentations import ColorJitter, CropParams, DataAugmentationDINO, make_crop
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets.small_photos import SmallPhotos
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.device_augmentation import make_crops, plan_crops, resize_weights
from dinov2_equi.data.loaders import make_train_loader, on_device
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.source_batch import SourceBatch

SIZE = (20, 26)
LEVEL = 1 / 255
PLAIN = CropParams(
    box=(3, 5, 31, 40), is_flipped=False, jitter=None, is_gray=False, blur_sigma=None, is_solarized=False
)
JITTER = ColorJitter(brightness=1.3, contrast=0.7, saturation=1.2, hue=-0.07, order=(2, 0, 3, 1))
PARTS: dict[str, dict[str, object]] = {
    "plain": {},
    "enlarged": {"box": (1, 2, 9, 11)},
    "one pixel": {"box": (7, 4, 1, 1)},
    "thin": {"box": (0, 3, 37, 2)},
    "flip": {"is_flipped": True},
    "jitter": {"jitter": JITTER},
    "jitter in another order": {"jitter": replace(JITTER, order=(3, 1, 2, 0))},
    "grey": {"is_gray": True},
    "weak blur": {"blur_sigma": 0.1},
    "strong blur": {"blur_sigma": 2.0},
    "everything but the threshold": {"is_flipped": True, "jitter": JITTER, "is_gray": True, "blur_sigma": 1.1},
}


def photograph(number: int = 0, size: tuple[int, int] = (37, 53)) -> Tensor:
    """A smooth picture with edges, uint8 [3, H, W]."""
    image = SmallPhotos(split="TRAIN").load(number).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def crops_both_ways(*choices: CropParams, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return one crop for each of the choices from one image: on the device, and one by one."""
    source = photograph() if source is None else source
    batched = make_crops(source[None], plan_crops([choices], SIZE))
    return batched, torch.stack([make_crop(source, params, SIZE) for params in choices])


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_a_crop_equals_that_of_one_image_at_a_time(part: str) -> None:
    batched, one_by_one = crops_both_ways(replace(PLAIN, **PARTS[part]))  # type: ignore[arg-type]
    # torchvision rounds to 8 bits after each of the two passes of the resizing, half a level each; jitter multiplies
    # it by up to 1.3 x 1.2.
    difference = (batched - one_by_one).abs()
    assert difference.mean() < LEVEL / 2
    assert difference.max() < 2.5 * LEVEL


def test_solarised_pixels_are_those_above_the_threshold() -> None:
    batched, one_by_one = crops_both_ways(PLAIN, replace(PLAIN, is_solarized=True))
    assert torch.equal(batched[1], torch.where(batched[0] >= 128 / 255, 1 - batched[0], batched[0]))
    # A value at the threshold may fall on either side of it.
    near = (one_by_one[0] - 128 / 255).abs() < 1.5 * LEVEL
    assert near.float().mean() < 0.1
    assert ((batched[1] - one_by_one[1]).abs() < 1.5 * LEVEL)[~near].all()


def test_operations_touch_their_own_crops_alone() -> None:
    """A crop is the same in whatever company."""
    choices = [replace(PLAIN, **changes) for changes in PARTS.values()]  # type: ignore[arg-type]
    together, _ = crops_both_ways(*choices)
    for crop, params in zip(together, choices, strict=True):
        alone, _ = crops_both_ways(params)
        assert (crop - alone[0]).abs().max() < 1e-5  # matrix products of other shapes


def test_resizing_equals_pillows_up_to_its_rounding() -> None:
    line = photograph(3, (37, 64))
    for start, extent, side in ((0, 64, 24), (5, 40, 17), (11, 13, 30), (8, 30, 30), (20, 1, 4)):
        weights = resize_weights(torch.tensor([float(start)]), torch.tensor([float(extent)]), 64, side)[0]
        cut = Image.fromarray(line.permute(1, 2, 0).numpy()).crop((start, 0, start + extent, 37))
        expected = np.asarray(cut.resize((side, 37), Image.Resampling.BICUBIC)).astype(float)
        resized = (line.float() @ weights.T).clamp(0, 255).permute(1, 2, 0).numpy()
        assert np.abs(resized - expected).max() < 0.51  # half a level, and Pillow's weights have 22 bits


def test_resizing_to_the_same_size_changes_nothing() -> None:
    weights = resize_weights(torch.tensor([2.0]), torch.tensor([9.0]), 14, 9)[0]
    assert torch.equal(weights, torch.eye(14)[2:11])


def test_images_of_different_sizes_do_not_see_what_is_beside_them() -> None:
    sizes = [(24, 61), (40, 30), (33, 33)]
    sources = [photograph(number, size) for number, size in enumerate(sizes)]
    augmentation = DataAugmentationDINO((0.3, 1.0), (0.05, 0.3), 3, SIZE, (8, 12), solarize_prob=0.0)
    choices = [augmentation.draw(size, np.random.default_rng(number)) for number, size in enumerate(sizes)]
    plan = plan_crops([choice.local_crops for choice in choices], (8, 12))
    for beside in (0, 255):
        padded = torch.full((3, 3, 40, 61), beside, dtype=torch.uint8)
        for place, source in zip(padded, sources, strict=True):
            place[:, : source.shape[1], : source.shape[2]] = source
        crops = make_crops(padded, plan).unflatten(0, (3, 3))  # crop-major
        for crop in range(3):
            for image, source in enumerate(sources):
                expected = make_crop(source, choices[image].local_crops[crop], (8, 12))
                assert (crops[crop, image] - expected).abs().mean() < LEVEL


def test_crop_smaller_than_the_blur_is_blurred() -> None:
    crops = make_crops(photograph()[None], plan_crops([[replace(PLAIN, blur_sigma=2.0)]], (3, 2)))
    assert crops.shape == (1, 3, 3, 2) and crops.isfinite().all()


def test_no_crops_keep_their_shape() -> None:
    assert make_crops(photograph()[None], plan_crops([[]], SIZE)).shape == (0, 3, *SIZE)


def batches(*, crop_later: bool, num_workers: int = 0, start_step: int = 0) -> list[Batch | SourceBatch]:
    loader = make_train_loader(
        dataset=SyntheticImages(9, (48, 64)),
        augmentation=DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 32, 16, solarize_prob=0.0),
        mask_generator=MaskingGenerator((4, 4)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        batch_size=4,
        num_workers=num_workers,
        seed=5,
        start_step=start_step,
        num_steps=4 - start_step,
        crop_later=crop_later,
    )
    return list(loader)


def test_both_ways_show_the_same_crops_in_the_same_order_with_the_same_masks() -> None:
    for later, at_once in zip(batches(crop_later=True), batches(crop_later=False), strict=True):
        assert isinstance(later, SourceBatch) and isinstance(at_once, Batch)
        batch = on_device(later, torch.device("cpu"))
        for name, one in batch.tensors().items():
            other = at_once.tensors()[name]
            assert one.shape == other.shape and one.dtype == other.dtype
            if "crops" in name:
                assert (one - other).abs().mean() < 1.5 * LEVEL  # noise: every rounding counts
            else:
                assert torch.equal(one, other), name
        assert later.batch_size == at_once.batch_size


@pytest.mark.parametrize("start_step", [0, 2])
def test_workers_and_a_resume_change_no_bit_of_what_is_cropped_later(start_step: int) -> None:
    device = torch.device("cpu")
    expected = batches(crop_later=True)[start_step:]
    for one, other in zip(expected, batches(crop_later=True, num_workers=2, start_step=start_step), strict=True):
        left, right = on_device(one, device), on_device(other, device)
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, right.tensors()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_makes_the_crops_of_the_cpu() -> None:
    batch = batches(crop_later=True)[0]
    assert isinstance(batch, SourceBatch)
    here = batch.make_crops()
    there = on_device(batch.pin_memory(), torch.device("cuda"))
    for name in ("global_crops", "local_crops"):
        # TF32 is off: what is left are float32 sums in another order, which jitter may enlarge.
        assert (getattr(there, name).cpu() - getattr(here, name)).abs().max() < 1e-4
    assert there.masks.is_cuda and not there.positions.is_cuda
