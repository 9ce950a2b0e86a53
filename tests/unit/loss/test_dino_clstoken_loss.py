from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinov2_equi.loss.dino_clstoken_loss import DINOLoss

K = 5


def softmax_by_loops(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy_by_loops(students: list[Tensor], teachers: list[Tensor], temperature: float) -> float:
    total = 0.0
    for student in students:
        for teacher in teachers:
            rows = []
            for logits, target in zip(student.tolist(), teacher.tolist(), strict=True):
                probs = softmax_by_loops([value / temperature for value in logits])
                rows.append(-sum(t * math.log(p) for t, p in zip(target, probs, strict=True)))
            total += sum(rows) / len(rows)
    return total


def test_the_loss_differs_from_plain_loops() -> None:
    torch.manual_seed(0)
    students = [torch.randn(4, K) for _ in range(3)]
    teachers = [torch.randn(4, K).softmax(-1) for _ in range(2)]
    expected = cross_entropy_by_loops(students, teachers, 0.3)
    assert DINOLoss(K, student_temp=0.3)(students, teachers).item() == pytest.approx(expected, rel=1e-6)


def test_stacked_teachers_differ_from_a_list() -> None:
    students = [torch.randn(4, K)]
    teachers = torch.randn(2, 4, K).softmax(-1)
    loss = DINOLoss(K)
    torch.testing.assert_close(loss(students, teachers), loss(students, list(teachers)), rtol=0, atol=0)


def test_the_teacher_probabilities_differ_from_plain_loops() -> None:
    loss = DINOLoss(K)
    loss.center.copy_(torch.linspace(-1, 1, K))
    logits = torch.randn(3, K)
    expected = [
        softmax_by_loops([(value - c) / 0.2 for value, c in zip(row, loss.center[0].tolist(), strict=True)])
        for row in logits.tolist()
    ]
    torch.testing.assert_close(loss.softmax_center_teacher(logits, 0.2), torch.tensor(expected), atol=1e-6, rtol=0)


def test_reading_the_teacher_moves_the_centre() -> None:
    loss = DINOLoss(K)
    loss.softmax_center_teacher(torch.randn(3, K), 0.1)
    loss.sinkhorn_knopp_teacher(torch.randn(3, K), 0.1)
    loss([torch.randn(3, K)], [torch.randn(3, K).softmax(-1)])
    assert (loss.center == 0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_centre_moves_to_the_wrong_place(momentum: float) -> None:
    loss = DINOLoss(K, center_momentum=momentum)
    loss.center.fill_(2.0)
    buffer = loss.center
    logits = torch.randn(6, K)
    loss.update_center(logits)
    expected = [momentum * 2.0 + (1 - momentum) * sum(column) / 6 for column in logits.T.tolist()]
    torch.testing.assert_close(loss.center, torch.tensor([expected]), atol=1e-6, rtol=0)  # float32 rounding
    assert loss.center is buffer
    assert loss.state_dict().keys() == {"center"}


def test_no_row_moves_the_centre() -> None:
    loss = DINOLoss(K)
    loss.center.fill_(2.0)
    loss.update_center(torch.zeros(0, K))
    assert (loss.center == 2.0).all()


def test_no_local_crops_give_no_zero() -> None:
    teachers = [torch.randn(4, K).softmax(-1)]
    assert DINOLoss(K)([], teachers).item() == 0.0
    assert DINOLoss(K)([torch.randn(4, K)], []).item() == 0.0
    empty = DINOLoss(K)([torch.zeros(0, K)], [torch.zeros(0, K)])
    assert empty.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 4])
def test_confident_or_duplicate_logits_give_nan(dtype: torch.dtype, batch: int) -> None:
    loss = DINOLoss(K)
    student = torch.tensor([[1000.0, -1000.0, 0.0, 0.0, 0.0]], dtype=dtype).repeat(batch, 1).requires_grad_()
    teacher_logits = torch.tensor([[-1000.0, 1000.0, 0.0, 0.0, 0.0]], dtype=dtype).repeat(batch, 1)
    for teacher in (
        loss.softmax_center_teacher(teacher_logits, 0.04),
        loss.sinkhorn_knopp_teacher(teacher_logits, 0.04),
    ):
        value = loss([student], [teacher])
        (gradient,) = torch.autograd.grad(value, student)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
