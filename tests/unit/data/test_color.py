"""Hue and blur against plain loops and against torchvision."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data.color import adjust_hue, gaussian_blur

ROUNDING = 5e-6  # float32, some tens of operations on values up to 10


def random_image(height: int = 11, width: int = 14) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


def mirrored(place: int, side: int) -> int:
    return -place if place < 0 else 2 * (side - 1) - place if place >= side else place


def blur_by_loops(image: Tensor, sigma: float) -> Tensor:
    weights = [[math.exp(-(y * y + x * x) / (2 * sigma**2)) for x in range(-4, 5)] for y in range(-4, 5)]
    total = sum(map(sum, weights))
    _, height, width = image.shape
    blurred = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for y in range(-4, 5):
                for x in range(-4, 5):
                    source = image[:, mirrored(row + y, height), mirrored(column + x, width)]
                    blurred[:, row, column] += weights[y + 4][x + 4] / total * source
    return blurred


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.013, 0.0, 0.05, 0.1, 0.33, 0.5])
def test_hue_equals_colorsys(shift: float) -> None:
    image = random_image()
    turned = adjust_hue(image, shift)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
            assert (turned[:, row, column] - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("shift", [-0.1, 0.07, 0.1])
def test_hue_equals_torchvision(shift: float) -> None:
    image = random_image(40, 33)
    assert (adjust_hue(image, shift) - tvf.adjust_hue(image, shift)).abs().max() < ROUNDING


def test_hue_of_a_batch_takes_one_shift_an_image() -> None:
    images = torch.stack([random_image(), random_image().flip(-1), 0.3 * random_image()])
    shifts = torch.tensor([-0.1, 0.0, 0.07])
    turned = adjust_hue(images, shifts[:, None, None])
    assert turned.shape == images.shape
    for image, shift, result in zip(images, shifts, turned, strict=True):
        assert (result - adjust_hue(image, shift.item())).abs().max() < ROUNDING


def test_hue_takes_any_leading_axes_and_shifts_that_broadcast_with_them() -> None:
    images = torch.rand(2, 4, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    shifts = torch.linspace(-0.5, 0.5, 8).view(2, 4, 1, 1)
    turned = adjust_hue(images, shifts)
    assert turned.shape == images.shape
    for row in range(2):
        for column in range(4):
            alone = adjust_hue(images[row, column], shifts[row, column].item())
            assert (turned[row, column] - alone).abs().max() < ROUNDING
    by_number, by_tensor = adjust_hue(images, 0.2), adjust_hue(images, torch.tensor(0.2))
    assert (by_number - by_tensor).abs().max() < ROUNDING


def test_hue_takes_one_shift_a_pixel() -> None:
    image = random_image(4, 6)
    shifts = torch.linspace(-0.5, 0.5, 24).view(4, 6)
    turned = adjust_hue(image, shifts)
    for row in range(4):
        for column in range(6):
            place = (slice(None), slice(row, row + 1), slice(column, column + 1))
            expected = adjust_hue(image[place], shifts[row, column].item())
            assert (turned[place] - expected).abs().max() < ROUNDING


def test_hue_of_a_batch_equals_torchvision() -> None:
    images = torch.rand(3, 3, 40, 33, generator=torch.Generator().manual_seed(2))
    for shift in (-0.1, 0.07):
        turned = adjust_hue(images, torch.full((3, 1, 1), shift))
        assert (turned - tvf.adjust_hue(images, shift)).abs().max() < ROUNDING


def test_hue_leaves_grey_black_and_white_as_they_are() -> None:
    for grey in (0.0, 1 / 255, 0.5, 1.0):
        image = torch.full((3, 4, 5), grey)
        assert torch.equal(adjust_hue(image, 0.1), image)


def test_hue_stays_in_range_for_pure_and_nearly_grey_colours() -> None:
    levels = torch.tensor([0.0, 1e-7, 0.5, 0.5 + 1e-7, 1.0 - 1e-7, 1.0])
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 12, 18)
    for shift in (-0.1, 0.1):
        turned = adjust_hue(image, shift)
        assert turned.isfinite().all() and turned.min() >= 0 and turned.max() <= 1


def test_operations_leave_their_input_alone() -> None:
    image = random_image()
    before = image.clone()
    shift = torch.full((1, 1), 0.1)
    adjust_hue(image, 0.1)
    adjust_hue(image, shift)
    gaussian_blur(image, 1.0)
    assert torch.equal(image, before)
    assert shift.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_the_loop(sigma: float) -> None:
    image = random_image(7, 9)
    assert (gaussian_blur(image, sigma) - blur_by_loops(image, sigma)).abs().max() < ROUNDING


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
def test_blur_equals_torchvision(sigma: float) -> None:
    image = random_image(40, 33)
    expected = tvf.gaussian_blur(image, [9, 9], [sigma, sigma])
    assert (gaussian_blur(image, sigma) - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (2, 3), (4, 5)])
def test_blur_of_a_crop_smaller_than_the_kernel_keeps_a_constant(size: tuple[int, int]) -> None:
    blurred = gaussian_blur(torch.full((3, *size), 0.25), 2.0)
    assert blurred.shape == (3, *size)
    assert (blurred - 0.25).abs().max() < ROUNDING
