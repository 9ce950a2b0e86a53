from __future__ import annotations

import math

import pytest
import torch

from dinov2_equi.loss.ibot_patch_loss import iBOTPatchLoss

K = 5


def test_the_loss_differs_from_plain_loops() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, K), torch.randn(7, K).softmax(-1)
    weights = [1 / 3] * 3 + [1 / 4] * 4  # two images with 3 and 4 masked patches, two without
    total = 0.0
    for logits, target, weight in zip(student.tolist(), teacher.tolist(), weights, strict=True):
        normaliser = sum(math.exp(value / 0.2) for value in logits)
        total -= weight * sum(t * math.log(math.exp(v / 0.2) / normaliser) for v, t in zip(logits, target, strict=True))
    loss = iBOTPatchLoss(K, student_temp=0.2).forward_masked(student, teacher, torch.tensor(weights), num_samples=4)
    assert loss.item() == pytest.approx(total / 4, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_mask_gives_nan_or_no_gradient(dtype: torch.dtype) -> None:
    loss = iBOTPatchLoss(K)
    student = torch.zeros(0, K, dtype=dtype, requires_grad=True)
    logits = torch.zeros(0, K, dtype=dtype)
    for teacher in (loss.softmax_center_teacher(logits, 0.04), loss.sinkhorn_knopp_teacher(logits, 0.04)):
        assert teacher.shape == (0, K)
        value = loss.forward_masked(student, teacher, torch.zeros(0), num_samples=4)
        assert value.item() == 0.0
        assert value.dtype == torch.float32
        value.backward()
    assert student.grad is not None


def test_no_mask_moves_the_centre() -> None:
    loss = iBOTPatchLoss(K)
    loss.center.fill_(1.0)
    loss.update_center(torch.zeros(0, K))
    assert (loss.center == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confident_logits_give_nan(dtype: torch.dtype) -> None:
    loss = iBOTPatchLoss(K)
    student = torch.tensor([[1000.0, -1000.0, 0.0, 0.0, 0.0]] * 3, dtype=dtype, requires_grad=True)
    teacher = loss.sinkhorn_knopp_teacher(-student.detach(), 0.04)
    value = loss.forward_masked(student, teacher, torch.ones(3) / 3, num_samples=1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_the_centre_moves_to_the_wrong_place() -> None:
    loss = iBOTPatchLoss(K, center_momentum=0.75)
    logits = torch.randn(6, K)
    loss.update_center(logits)
    # float32 rounding; every masked patch counts the same
    torch.testing.assert_close(loss.center, 0.25 * logits.mean(0).view(1, 1, K), atol=1e-6, rtol=0)
    assert loss.center.shape == (1, 1, K)


def test_the_centre_is_not_subtracted_or_adds_an_axis() -> None:
    loss = iBOTPatchLoss(K)
    loss.center.copy_(torch.randn(1, 1, K))
    logits = loss.center[0] + torch.zeros(3, K)
    torch.testing.assert_close(loss.softmax_center_teacher(logits, 0.1), torch.full((3, K), 1 / K))


@pytest.mark.parametrize(("teacher", "weights", "images"), [(6, 7, 4), (7, 6, 4), (7, 7, 0)])
def test_sizes_that_do_not_agree_are_accepted(teacher: int, weights: int, images: int) -> None:
    with pytest.raises(ValueError, match=r"weights \[M\] and num_samples >= 1, got \[7, 5\]"):
        iBOTPatchLoss(K).forward_masked(torch.zeros(7, K), torch.zeros(teacher, K), torch.zeros(weights), images)
