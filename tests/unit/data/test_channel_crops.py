"""Crops of images that are no photographs: any channels, full precision, no operations on hue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinov2_equi.data.augmentations import BLUR_KERNEL_PX, CropParams, DataAugmentationDINO, make_crop
from dinov2_equi.data.color import gaussian_blur
from dinov2_equi.data.contact_sheet import contact_sheet
from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.loaders import make_train_loader, on_device
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.transforms import EvalTransform, normalize


def augmentation(**changes: object) -> DataAugmentationDINO:
    return DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8, is_rgb=False, **changes)  # type: ignore[arg-type]


def image(channels: int = 5, height: int = 30, width: int = 42) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0))


def test_choices_are_those_of_photographs_without_hue_saturation_grey_and_solarisation() -> None:
    with_color = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8)
    for seed in range(100):
        ours, theirs = (kind.draw((30, 42), np.random.default_rng(seed)) for kind in (augmentation(), with_color))
        for one, other in zip(
            ours.global_crops + ours.local_crops, theirs.global_crops + theirs.local_crops, strict=True
        ):
            assert (one.box, one.is_flipped, one.blur_sigma) == (other.box, other.is_flipped, other.blur_sigma)
            assert not one.is_gray and not one.is_solarized
            assert (one.jitter is None) == (other.jitter is None)
            if one.jitter is not None and other.jitter is not None:
                assert (one.jitter.saturation, one.jitter.hue) == (1.0, 0.0)
                assert (one.jitter.brightness, one.jitter.contrast) == (other.jitter.brightness, other.jitter.contrast)


def test_each_operation_against_plain_arithmetic() -> None:
    source = image()
    for choices in (augmentation().draw((30, 42), np.random.default_rng(seed)) for seed in range(30)):
        for params in choices.global_crops:
            top, left, height, width = params.box
            cut = source[None, :, top : top + height, left : left + width]
            expected = F.interpolate(cut, (16, 16), mode="bicubic", antialias=True)[0].clamp(0, 1)
            expected = expected.flip(-1) if params.is_flipped else expected
            for number in params.jitter.order if params.jitter else ():
                if number == 0:
                    expected = (expected * params.jitter.brightness).clamp(0, 1)  # type: ignore[union-attr]
                if number == 1:
                    mean = expected.mean((1, 2), keepdim=True)
                    expected = (mean + (expected - mean) * params.jitter.contrast).clamp(0, 1)  # type: ignore[union-attr]
            if params.blur_sigma is not None:
                expected = gaussian_blur(expected, params.blur_sigma, BLUR_KERNEL_PX)
            torch.testing.assert_close(make_crop(source, params, (16, 16)), expected, rtol=0, atol=2e-6)


def test_a_crop_that_changes_nothing_keeps_all_16_bits() -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2**16, (4, 16, 16), np.uint16).astype(np.float32))
    plain = CropParams(
        (0, 0, 16, 16), is_flipped=False, jitter=None, is_gray=False, blur_sigma=None, is_solarized=False
    )
    crop = make_crop(values / 65535, plain, (16, 16))
    assert torch.equal((crop.double() * 65535).round(), values.double())


def folder_of_arrays(folder: Path, channels: int, count: int = 5) -> None:
    for number in range(count):
        shape = (channels, 20 + number, 31 - number)
        np.save(folder / f"{number}.npy", np.random.default_rng(number).integers(0, 2**16, shape, np.uint16))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_made_on_the_device_are_others_than_those_of_the_processes(tmp_path: Path, channels: int) -> None:
    folder_of_arrays(tmp_path, channels)
    dataset = make_dataset(str(tmp_path), ChannelFormat(channels, (0, 65535)))
    batches = []
    for crop_later in (False, True):
        loader = make_train_loader(
            dataset=dataset,
            augmentation=augmentation(),
            mask_generator=MaskingGenerator((4, 4)),
            mask_probability=0.5,
            mask_ratio_min_max=(0.1, 0.5),
            batch_size=8,
            num_workers=0,
            seed=1,
            start_step=0,
            num_steps=2,
            crop_later=crop_later,
        )
        batches.append([on_device(batch, torch.device("cpu")) for batch in loader])
    for one, other in zip(*batches, strict=True):
        assert one.global_crops.shape == (16, channels, 16, 16) and one.local_crops.shape == (16, channels, 8, 8)
        for name in ("global_crops", "local_crops"):
            # Two ways to sum the same products in float32; blur and contrast amplify nothing.
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=2e-5)


def test_without_local_crops_there_are_none(tmp_path: Path) -> None:
    crops = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 16, 8, is_rgb=False)(image(), np.random.default_rng(0))
    assert crops.global_crops.shape == (2, 5, 16, 16) and crops.local_crops.shape == (0, 5, 8, 8)


def test_evaluation_keeps_channels_and_range_and_the_sheet_shows_three() -> None:
    source = image(5, 40, 60)
    prepared = EvalTransform(16)(source)
    assert prepared.shape == (5, 16, 16) and 0 <= prepared.min() and prepared.max() <= 1
    crops = augmentation()(source, np.random.default_rng(0))
    assert contact_sheet([source], [crops], tile=20).shape == (24, 5 * 24, 3)


def test_images_of_other_channels_than_the_network_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="reads images of 5 channels, these have 3: data.in_channels"):
        normalize(torch.rand(2, 3, 4, 4), [0.5] * 5, [0.2] * 5)
