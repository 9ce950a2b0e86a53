"""Every operation of a crop against Pillow's, for the same parameters, on photographs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data import crop_pixels
from dinov2_equi.data.augmentations import ColorJitter, CropParams, make_crop
from dinov2_equi.data.color import adjust_hue, gaussian_blur
from dinov2_equi.data.crop_pixels import Pixels
from dinov2_equi.data.datasets.base import image_to_tensor
from dinov2_equi.data.datasets.sample_photos import SamplePhotos

MAX_MEAN_ERROR = 2.0  # levels of 255: a person sees no difference, and Pillow itself rounds after each operation
PLAIN = CropParams(
    box=(11, 20, 210, 250), is_flipped=False, jitter=None, is_gray=False, blur_sigma=None, is_solarized=False
)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    dataset = SamplePhotos(split="TRAIN", regions=12)
    return [dataset.load(index).resize((320, 240), Image.Resampling.BICUBIC) for index in range(len(dataset))][:6]


def pixels_of(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.float32)


def mean_error(one: Pixels, other: Image.Image) -> float:
    return float(np.abs(one - np.asarray(other.convert("RGB")).astype(np.float32)).mean())


def changed(change: Callable[[Pixels], np.ndarray]) -> Callable[[Pixels], Pixels]:
    return lambda pixels: crop_pixels.clamp_(crop_pixels.change_colors(pixels, change(pixels)))


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (lambda factor: changed(lambda _: crop_pixels.brightness(factor)), ImageEnhance.Brightness),
        (
            lambda factor: changed(lambda pixels: crop_pixels.contrast(factor, crop_pixels.mean_luma(pixels, None))),
            ImageEnhance.Contrast,
        ),
        (lambda factor: changed(lambda _: crop_pixels.saturation(factor)), ImageEnhance.Color),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_jitter_is_pillows(
    photographs: list[Image.Image],
    ours: Callable[[float], Callable[[Pixels], Pixels]],
    pillows: Callable[[Image.Image], ImageEnhance._Enhance],
    factor: float,
) -> None:
    for image in photographs:
        assert mean_error(ours(factor)(pixels_of(image)), pillows(image).enhance(factor)) < 1.0


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.01, 0.0, 0.03, 0.1, 0.4, 0.5])  # reds left of 0 once turned white
def test_hue_is_pillows_and_that_of_whole_batches(photographs: list[Image.Image], shift: float) -> None:
    for image in photographs:
        turned = crop_pixels.turn_hue(pixels_of(image), shift)
        # Pillow has 255 hues: a degree and a half each.
        assert mean_error(turned, tvf.adjust_hue(image, shift)) < MAX_MEAN_ERROR
        # The same in float32, through other formulas.
        batched = adjust_hue(image_to_tensor(image).float() / 255, shift).permute(1, 2, 0).numpy()
        assert np.abs(turned / 255 - batched).max() < 2e-5


def test_hue_of_every_colour_is_that_of_whole_batches() -> None:
    levels = torch.arange(0, 256, 15, dtype=torch.float32)
    cube = torch.cartesian_prod(levels, levels, levels).reshape(18, -1, 3)
    for shift in torch.linspace(-0.5, 0.5, 41).tolist():
        turned = torch.from_numpy(crop_pixels.turn_hue(cube.numpy(), shift)).permute(2, 0, 1) / 255
        assert (turned - adjust_hue(cube.permute(2, 0, 1) / 255, shift)).abs().max() < 2e-5


def test_grey_is_pillows(photographs: list[Image.Image]) -> None:
    for image in photographs:
        gray = crop_pixels.change_colors(pixels_of(image), crop_pixels.saturation(0.0))
        assert mean_error(gray, image.convert("L")) < 1.0
        assert np.array_equal(gray[..., 0], gray[..., 1]) and np.array_equal(gray[..., 0], gray[..., 2])


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.2, 2.0])
def test_blur_is_torchvisions_and_near_pillows(photographs: list[Image.Image], sigma: float) -> None:
    for image in photographs:
        blurred = crop_pixels.blur(pixels_of(image), sigma, 9)
        assert mean_error(blurred, tvf.gaussian_blur(image, 9, sigma)) < 0.6  # it rounds to 8 bits
        exact = gaussian_blur(image_to_tensor(image).float(), sigma).permute(1, 2, 0).numpy()
        assert np.abs(blurred - exact).max() < 2e-3  # taps below a millionth are left out
        # Pillow's own filter is three boxes, and has no kernel size.
        assert mean_error(blurred, image.filter(ImageFilter.GaussianBlur(sigma))) < MAX_MEAN_ERROR


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2), (5, 40)])
def test_blur_of_sides_shorter_than_the_kernel(shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 255
    blurred = crop_pixels.blur(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), 1.5, 9)
    assert np.abs(blurred.reshape(*shape, 3) - gaussian_blur(image, 1.5).permute(1, 2, 0).numpy()).max() < 2e-3


def test_solarisation_is_pillows_to_the_last_bit(photographs: list[Image.Image]) -> None:
    for image in photographs:
        assert mean_error(crop_pixels.solarize_(pixels_of(image), 128.0), ImageOps.solarize(image, 128)) == 0.0


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (300, 64), (210, 250)])
@pytest.mark.parametrize("flip", [False, True])
def test_resizing_and_flip_are_pillows(photographs: list[Image.Image], size: tuple[int, int], flip: bool) -> None:
    top, left, height, width = PLAIN.box
    for image in photographs:
        params = CropParams(**{**vars(PLAIN), "is_flipped": flip})
        crop = make_crop(image_to_tensor(image), params, size).permute(1, 2, 0).numpy() * 255
        cut = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        assert mean_error(crop, ImageOps.mirror(cut) if flip else cut) < 0.5


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
@pytest.mark.parametrize("strengths", [(1.4, 1.4, 1.2, 0.1), (0.6, 0.6, 0.8, -0.1), (0.7, 1.3, 0.9, 0.05)])
def test_operations_that_are_multiplied_together_give_pillows_one_after_the_other(
    photographs: list[Image.Image], order: tuple[int, ...], strengths: tuple[float, float, float, float]
) -> None:
    brightness, contrast, saturation, hue = strengths
    steps: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: ImageEnhance.Brightness(image).enhance(brightness),
        lambda image: ImageEnhance.Contrast(image).enhance(contrast),
        lambda image: ImageEnhance.Color(image).enhance(saturation),
        lambda image: tvf.adjust_hue(image, hue),
    )
    for image in photographs:
        expected = image
        for number in order:
            expected = steps[number](expected)
        params = CropParams((0, 0, 240, 320), False, ColorJitter(*strengths, order), False, None, False)
        crop = make_crop(image_to_tensor(image), params, (240, 320))
        assert (
            mean_error(crop.permute(1, 2, 0).numpy() * 255, expected) < 2 * MAX_MEAN_ERROR
        )  # four operations, each rounded by Pillow


def test_nothing_to_change_changes_no_bit(photographs: list[Image.Image]) -> None:
    image = image_to_tensor(photographs[0])
    params = CropParams(**{**vars(PLAIN), "box": (0, 0, 240, 320)})
    assert torch.equal(make_crop(image, params, (240, 320)), image.float() / 255)
