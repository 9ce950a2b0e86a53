"""The reconstruction error against plain loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.loss import reconstruction_error

Noise = Callable[..., Tensor]

SHAPE = (2, 3, 3, 4, 6)  # [S, B, 3, H, W], not square


def test_error_equals_plain_loops(noise: Noise) -> None:
    images, targets = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1)
    S, B, C, H, W = SHAPE
    errors = reconstruction_error(images, targets)
    assert errors.shape == (S,)
    for s in range(S):
        total = 0.0
        for b in range(B):
            for c in range(C):
                for y in range(H):
                    for x in range(W):
                        total += (images[s, b, c, y, x].item() - targets[s, b, c, y, x].item()) ** 2
        assert errors[s].item() == pytest.approx(total / (B * C * H * W), rel=1e-5)  # float32 sum of 216 terms


def test_error_of_equal_images_is_zero(noise: Noise) -> None:
    assert torch.equal(reconstruction_error(noise(*SHAPE), noise(*SHAPE)), torch.zeros(2))


def test_error_of_black_against_white_is_one() -> None:
    assert torch.equal(reconstruction_error(torch.zeros(SHAPE), torch.ones(SHAPE)), torch.ones(2))


def test_error_of_one_step_leaves_the_other_alone(noise: Noise) -> None:
    images, targets = noise(*SHAPE), noise(*SHAPE)
    images[1] += 0.5
    errors = reconstruction_error(images, targets)
    assert errors[0].item() == 0
    assert errors[1].item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_compared_in_float32(dtype: torch.dtype, noise: Noise) -> None:
    images, targets = noise(*SHAPE, seed=0).to(dtype), noise(*SHAPE, seed=1)
    errors = reconstruction_error(images, targets)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, reconstruction_error(images.float(), targets))


def test_squares_of_half_precision_do_not_underflow() -> None:
    images, targets = torch.zeros(SHAPE, dtype=torch.float16), torch.full(SHAPE, 1e-4, dtype=torch.float16)
    # 1e-8 is zero in float16; 1e-4 is stored there to three digits.
    torch.testing.assert_close(reconstruction_error(images, targets), torch.full((2,), 1e-8), rtol=1e-3, atol=0)


def test_autocast_does_not_lower_the_precision(noise: Noise) -> None:
    images, targets = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = reconstruction_error(images, targets)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, reconstruction_error(images, targets))


def test_gradient_is_twice_the_difference_over_the_number_of_pixels(noise: Noise) -> None:
    images, targets = noise(*SHAPE, seed=0).requires_grad_(), noise(*SHAPE, seed=1)
    reconstruction_error(images, targets).sum().backward()
    expected = 2 * (images.detach() - targets) / images[0].numel()
    torch.testing.assert_close(images.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 3, 4, 6), (2, 1, 3, 4, 6), (2, 3, 3, 6, 4), (2, 3, 3, 24)])
def test_other_shapes_are_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        reconstruction_error(torch.zeros(SHAPE), torch.zeros(shape))
    assert str(list(SHAPE)) in str(caught.value)
    assert str(list(shape)) in str(caught.value)
