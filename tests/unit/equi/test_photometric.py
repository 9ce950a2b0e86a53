"""Colour against torchvision, op by op; blur against a convolution in double precision; both on images not square."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.photometric import Blur, Color

Noise = Callable[..., Tensor]

H, W = 33, 50
ROUNDING = 1e-5  # float32: some tens of operations on values in [0, 1], the hue in [0, 6]
LEVEL = 1 / 255

OPS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image, delta: tvf.adjust_brightness(image, 1 + delta),
    lambda image, delta: tvf.adjust_contrast(image, 1 + delta),
    lambda image, delta: tvf.adjust_saturation(image, 1 + delta),
    tvf.adjust_hue,
)
"""torchvision's, in the order of the parameters."""


def color(**ranges: float) -> Color:
    return Color(FamilySettings(**ranges))  # type: ignore[arg-type]


def draw_colors(count: int, seed: int = 0, **ranges: float) -> Tensor:
    return color(**ranges).draw(count, torch.Generator().manual_seed(seed))


def in_turn(image: Tensor, deltas: list[float], order: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """Return torchvision's image after its four operations."""
    for index in order:
        image = OPS[index](image, deltas[index])
    return image


# --------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("max_saturation", [0.1, 0.4])  # Table 2 to the letter, and what is usual
def test_color_equals_the_four_operations_of_torchvision_in_turn(max_saturation: float, noise: Noise) -> None:
    images, theta = noise(16, 3, H, W), draw_colors(16, max_saturation=max_saturation)
    changed = color(max_saturation=max_saturation).apply(images, theta)
    expected = torch.stack([in_turn(image, row.tolist()) for image, row in zip(images, theta, strict=True)])
    torch.testing.assert_close(changed, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("signs", list(itertools.product((-1, 1), repeat=4)))
def test_color_at_the_ends_of_its_ranges_equals_torchvision(signs: tuple[int, ...], noise: Noise) -> None:
    # Black, white and pure colours beside random ones: every clamp is met.
    image = torch.cat([noise(3, H, W), noise(3, H, W, seed=1).round()], dim=-1)
    deltas = [sign * limit for sign, limit in zip(signs, (0.4, 0.4, 0.4, 0.1), strict=True)]
    changed = color().apply(image.unsqueeze(0), torch.tensor([deltas]))[0]
    torch.testing.assert_close(changed, in_turn(image, deltas), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("index", range(4), ids=color().param_names)
def test_one_parameter_alone_is_its_operation_alone(index: int, noise: Noise) -> None:
    images, deltas = noise(3, 3, H, W), (-0.1, 0.04, 0.1)
    theta = torch.zeros(3, 4)
    theta[:, index] = torch.tensor(deltas)
    changed = color().apply(images, theta)
    expected = torch.stack([OPS[index](image, delta) for image, delta in zip(images, deltas, strict=True)])
    torch.testing.assert_close(changed, expected, rtol=0, atol=ROUNDING)


def test_order_of_the_operations_is_the_stated_one(noise: Noise) -> None:
    image, deltas = noise(3, H, W), [0.4, 0.4, -0.4, 0.1]
    changed = color().apply(image.unsqueeze(0), torch.tensor([deltas]))[0]
    for order in itertools.permutations(range(4)):
        difference = (changed - in_turn(image, deltas, order)).abs().mean()
        assert (difference < ROUNDING) == (order == (0, 1, 2, 3))


def test_contrast_takes_the_mean_of_each_image_and_not_of_the_batch(noise: Noise) -> None:
    images = torch.stack([noise(3, H, W) * 0.2, 0.8 + noise(3, H, W, seed=1) * 0.2])
    changed = color().apply(images, torch.tensor([[0.0, -0.4, 0.0, 0.0]]).expand(2, -1))
    means = images.mean(dim=(1, 2, 3))
    torch.testing.assert_close(changed.mean(dim=(1, 2, 3)), means, rtol=0, atol=0.01)  # the luma's weights differ a bit


def test_color_of_no_parameters_is_the_identity(noise: Noise) -> None:
    images = torch.cat([noise(2, 3, H, W), noise(2, 3, H, W).round(), torch.full((1, 3, H, W), 0.5)])
    torch.testing.assert_close(color().apply(images, torch.zeros(5, 4)), images, rtol=0, atol=ROUNDING)


def test_hue_and_saturation_leave_a_grey_image_grey(noise: Noise) -> None:
    images = noise(2, 1, H, W).expand(-1, 3, -1, -1)
    changed = color().apply(images, torch.tensor([[0.0, 0.0, 0.1, 0.1], [0.0, 0.0, -0.1, -0.1]]))
    torch.testing.assert_close(changed, images, rtol=0, atol=1e-4)  # torchvision's luma weights add up to 0.9999


def test_opposite_hues_undo_each_other_and_hues_add_up(noise: Noise) -> None:
    images = noise(4, 3, H, W)

    def turned(images: Tensor, turns: float) -> Tensor:
        return color().apply(images, torch.tensor([[0.0, 0.0, 0.0, turns]]).expand(len(images), -1))

    for a, b in ((0.1, 0.06), (-0.1, 0.03), (-0.02, -0.07)):
        torch.testing.assert_close(turned(turned(images, a), -a), images, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(turned(turned(images, a), b), turned(images, a + b), rtol=0, atol=ROUNDING)


def test_brightness_factors_multiply_where_nothing_is_clamped(noise: Noise) -> None:
    images = 0.5 * noise(2, 3, H, W)

    def brighter(images: Tensor, delta: float) -> Tensor:
        return color().apply(images, torch.tensor([[delta, 0.0, 0.0, 0.0]]).expand(len(images), -1))

    torch.testing.assert_close(
        brighter(brighter(images, 0.4), -0.2), brighter(images, 1.4 * 0.8 - 1), rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(brighter(brighter(images, 0.25), -0.2), images, rtol=0, atol=ROUNDING)


def test_parts_of_the_path_scale_the_factors_and_the_shift(noise: Noise) -> None:
    images, family = noise(1, 3, H, W), color()
    theta = torch.tensor([[0.3, -0.3, 0.09, -0.06]])
    third = family.apply(images, family.scale(theta, 1 / 3))[0]
    torch.testing.assert_close(third, in_turn(images[0], [0.1, -0.1, 0.03, -0.02]), rtol=0, atol=ROUNDING)


# ----------------------------------------------------------------------------------------------------------------- blur

SIGMAS = (0.1, 0.35, 0.7, 1.3, 2.0)


def blur(low: float = 0.1, high: float = 2.0) -> Blur:
    return Blur(FamilySettings(blur_sigma_px=(low, high)))


def blurred(images: Tensor, *sigmas: float) -> Tensor:
    return blur().apply(images, torch.tensor(sigmas)[:, None])


def direct_convolution(image: Tensor, sigma: float, radius: int) -> np.ndarray:
    """Return the image [C, H, W] under a square kernel of the Gaussian, float64, mirrored at the outer pixels."""
    source = image.double().numpy()
    _, height, width = source.shape
    padded = np.pad(source, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    taps = range(-radius, radius + 1)
    total, result = 0.0, np.zeros_like(source)
    for y, x in itertools.product(taps, taps):
        weight = math.exp(-(y * y + x * x) / (2 * sigma**2))
        total += weight
        result += weight * padded[:, radius + y : radius + y + height, radius + x : radius + x + width]
    return result / total


def test_blur_equals_the_direct_convolution_with_the_same_kernel(noise: Noise) -> None:
    images = noise(len(SIGMAS), 3, H, W)
    for image, sigma, result in zip(images, SIGMAS, blurred(images, *SIGMAS), strict=True):
        expected = direct_convolution(image, sigma, radius=6)  # three times the greatest sigma
        assert np.abs(result.double().numpy() - expected).max() < ROUNDING


def test_blur_is_within_a_level_of_the_whole_gaussian(noise: Noise) -> None:
    images = noise(len(SIGMAS), 3, H, W).round()  # black and white: the hardest
    for image, sigma, result in zip(images, SIGMAS, blurred(images, *SIGMAS), strict=True):
        error = np.abs(result.double().numpy() - direct_convolution(image, sigma, radius=14))  # 7 sigma
        assert error.mean() < 0.2 * LEVEL
        assert error.max() < LEVEL


def test_blur_equals_scipy_which_calls_these_borders_mirror(noise: Noise) -> None:
    images = noise(len(SIGMAS), 3, H, W)
    for image, sigma, result in zip(images, SIGMAS, blurred(images, *SIGMAS), strict=True):
        found, source = result.double().numpy(), image.double().numpy()
        sigmas = (0, sigma, sigma)
        same_kernel = ndimage.gaussian_filter(source, sigmas, mode="mirror", radius=(0, 6, 6))
        assert np.abs(found - same_kernel).max() < ROUNDING
        assert np.abs(found - ndimage.gaussian_filter(source, sigmas, mode="mirror", truncate=7)).mean() < 0.2 * LEVEL


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_equals_torchvision(sigma: float, noise: Noise) -> None:
    images = noise(2, 3, H, W)
    expected = tvf.gaussian_blur(images, [13, 13], [sigma, sigma])
    torch.testing.assert_close(blurred(images, sigma, sigma), expected, rtol=0, atol=ROUNDING)


def test_each_image_and_step_has_its_own_blur(noise: Noise) -> None:
    images, sigmas = noise(2, 3, H, W), torch.tensor([[0.5, 1.0], [1.5, 2.0], [0.2, 0.9]])  # [S, B]
    together = blur().apply(images, sigmas.unsqueeze(-1))
    for s, b in itertools.product(range(3), range(2)):
        expected = direct_convolution(images[b], sigmas[s, b].item(), radius=6)
        assert np.abs(together[s, b].double().numpy() - expected).max() < ROUNDING


@pytest.mark.parametrize("sigma", [0.0, 1e-6, 0.03, 0.1])
def test_blur_without_width_changes_no_bit_and_is_finite(sigma: float, noise: Noise) -> None:
    images = noise(1, 3, H, W)
    result = blurred(images, sigma)
    assert torch.equal(result, images)  # at 0.1 the neighbour's weight is exp(-50)


def test_blurs_compose_by_their_squares(noise: Noise) -> None:
    images = noise(1, 3, H, W)
    error = (blurred(blurred(images, 1.2), 1.6) - blurred(images, 2.0)).abs()
    assert error.mean() < 0.2 * LEVEL  # a sampled and truncated Gaussian is one up to these
    assert error.max() < LEVEL


def test_blur_keeps_a_constant_image_and_the_mean_of_a_spot() -> None:
    constant = torch.full((1, 3, H, W), 0.7)
    torch.testing.assert_close(blurred(constant, 2.0), constant, rtol=0, atol=1e-6)
    spot = torch.zeros(1, 3, H, W)
    spot[..., 16, 25] = 1.0
    result = blurred(spot, 1.5)[0, 0]
    assert result.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert result.max() == result[16, 25]
    assert result[16, 25].item() == pytest.approx(1 / (2 * math.pi * 1.5**2), abs=1e-3)  # height of the density
    torch.testing.assert_close(result[16, 19:32], result[10:23, 25], rtol=0, atol=1e-7)  # the same along both axes


def test_a_wider_range_of_blurs_gets_a_wider_kernel(noise: Noise) -> None:
    image = noise(1, 3, H, W)
    result = blur(0.1, 4.0).apply(image, torch.tensor([[4.0]]))[0].double().numpy()
    assert np.abs(result - direct_convolution(image[0], 4.0, radius=12)).max() < ROUNDING


def test_blur_draws_between_its_two_sigmas_and_not_around_zero() -> None:
    sigmas = blur(0.3, 0.9).draw(10_000, torch.Generator().manual_seed(0))
    assert 0.3 <= sigmas.min() < 0.301
    assert 0.899 < sigmas.max() <= 0.9
    assert sigmas.mean().item() == pytest.approx(0.6, abs=0.01)  # the standard error is 0.0017


@pytest.mark.parametrize("fill", ["reflect", "zeros"])
def test_fill_is_no_business_of_families_that_move_nothing(fill: str, noise: Noise) -> None:
    images, settings = noise(2, 3, H, W), FamilySettings(fill=fill)
    sigmas, deltas = torch.tensor([[0.4], [2.0]]), draw_colors(2)
    assert torch.equal(Blur(settings).apply(images, sigmas), blurred(images, 0.4, 2.0))
    assert torch.equal(Color(settings).apply(images, deltas), color().apply(images, deltas))
