"""The reconstruction error against plain loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.loss import reconstruction_error

Noise = Callable[..., Tensor]

SHAPE = (2, 3, 5, 7)  # [S, B, N, C]


def plain_loops(predictions: Tensor, targets: Tensor, weights: Tensor | None) -> list[float]:
    S, B, N, C = predictions.shape
    errors = []
    for s in range(S):
        total = sum_of_weights = 0.0
        for b in range(B):
            for n in range(N):
                squares = [(predictions[s, b, n, c].item() - targets[s, b, n, c].item()) ** 2 for c in range(C)]
                weight = 1.0 if weights is None else weights[b, n if weights.shape[1] > 1 else 0].item()
                total += weight * sum(squares) / C
                sum_of_weights += weight
        errors.append(total / sum_of_weights)
    return errors


def some_weights(name: str, noise: Noise) -> Tensor | None:
    _, B, N, _ = SHAPE
    hidden = noise(B, N, seed=5) < 0.5
    images = torch.tensor([[1.0], [0.0], [1.0]])
    return {"none": None, "any": noise(B, N, seed=4), "hidden patches": hidden.float(), "some images": images}[name]


@pytest.mark.parametrize("weights", ["none", "any", "hidden patches", "some images"])
def test_error_equals_plain_loops(weights: str, noise: Noise) -> None:
    predictions, targets, given = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1), some_weights(weights, noise)
    errors = reconstruction_error(predictions, targets, given)
    assert errors.shape == (2,)
    assert errors.tolist() == pytest.approx(plain_loops(predictions, targets, given), rel=1e-5)  # float32 sums


def test_error_of_equal_patches_is_zero(noise: Noise) -> None:
    assert torch.equal(reconstruction_error(noise(*SHAPE), noise(*SHAPE)), torch.zeros(2))


def test_error_of_black_against_white_is_one() -> None:
    assert torch.equal(reconstruction_error(torch.zeros(SHAPE), torch.ones(SHAPE)), torch.ones(2))


def test_error_of_one_step_leaves_the_other_alone(noise: Noise) -> None:
    predictions, targets = noise(*SHAPE), noise(*SHAPE)
    predictions[1] += 0.5
    errors = reconstruction_error(predictions, targets)
    assert errors[0].item() == 0
    assert errors[1].item() == pytest.approx(0.25, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1)])
def test_weights_that_are_all_the_same_change_nothing(shape: tuple[int, int], factor: float, noise: Noise) -> None:
    predictions, targets = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1)
    weighted = reconstruction_error(predictions, targets, torch.full(shape, factor))
    torch.testing.assert_close(weighted, reconstruction_error(predictions, targets), rtol=1e-5, atol=0)


def test_patch_of_weight_zero_does_not_count(noise: Noise) -> None:
    predictions, targets, weights = noise(*SHAPE, seed=0).requires_grad_(), noise(*SHAPE, seed=1), torch.ones(3, 5)
    weights[1, 2] = 0
    errors = reconstruction_error(predictions, targets, weights)
    errors.sum().backward()
    assert predictions.grad is not None
    assert not predictions.grad[:, 1, 2].any()
    predictions.grad[:, 1, 2] = 1
    assert predictions.grad.all()
    with torch.no_grad():
        predictions[:, 1, 2] = 1e6
    torch.testing.assert_close(reconstruction_error(predictions, targets, weights), errors, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (3, 1)])
def test_without_any_weight_the_error_is_zero_and_its_gradient_finite(shape: tuple[int, int], noise: Noise) -> None:
    predictions = noise(*SHAPE, seed=0).requires_grad_()
    errors = reconstruction_error(predictions, noise(*SHAPE, seed=1), torch.zeros(shape))
    assert torch.equal(errors, torch.zeros(2))
    errors.sum().backward()
    assert predictions.grad is not None
    assert torch.equal(predictions.grad, torch.zeros(SHAPE))


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_patches_are_compared_in_float32(dtype: torch.dtype, noise: Noise) -> None:
    predictions, targets = noise(*SHAPE, seed=0).to(dtype), noise(*SHAPE, seed=1)
    errors = reconstruction_error(predictions, targets)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, reconstruction_error(predictions.float(), targets))


def test_squares_of_half_precision_do_not_underflow() -> None:
    predictions, targets = torch.zeros(SHAPE, dtype=torch.float16), torch.full(SHAPE, 1e-4, dtype=torch.float16)
    # 1e-8 is zero in float16; 1e-4 is stored there to three digits.
    torch.testing.assert_close(reconstruction_error(predictions, targets), torch.full((2,), 1e-8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weights", ["none", "any"])
def test_autocast_does_not_lower_the_precision(weights: str, noise: Noise) -> None:
    predictions, targets, given = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1), some_weights(weights, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = reconstruction_error(predictions, targets, given)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, reconstruction_error(predictions, targets, given))


def test_gradient_is_twice_the_difference_over_the_number_of_pixels(noise: Noise) -> None:
    predictions, targets = noise(*SHAPE, seed=0).requires_grad_(), noise(*SHAPE, seed=1)
    reconstruction_error(predictions, targets).sum().backward()
    expected = 2 * (predictions.detach() - targets) / predictions[0].numel()
    torch.testing.assert_close(predictions.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 1, 5, 7), (2, 3, 7, 5), (2, 3, 35)])
def test_other_shapes_are_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        reconstruction_error(torch.zeros(SHAPE), torch.zeros(shape))
    assert str(list(SHAPE)) in str(caught.value)
    assert str(list(shape)) in str(caught.value)
