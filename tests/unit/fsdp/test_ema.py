"""The teacher's moving average against the formula, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dinov2_equi.fsdp.ema import update_ema_


def make_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return teacher, student


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.996, 1.0])
def test_each_parameter_follows_the_formula(momentum: float) -> None:
    teacher, student = make_pair()
    before = {name: value.detach().double() for name, value in teacher.named_parameters()}
    update_ema_(teacher, student, momentum)
    for name, parameter in student.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * parameter.detach().double()
        # Two float32 roundings of numbers of size 1.
        torch.testing.assert_close(teacher.get_parameter(name).detach().double(), expected, rtol=3e-7, atol=3e-7)


def test_momentum_one_keeps_the_teacher_bit_for_bit() -> None:
    teacher, student = make_pair()
    before = copy.deepcopy(teacher.state_dict())
    update_ema_(teacher, student, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_student_stays_as_it_is() -> None:
    teacher, student = make_pair()
    before = copy.deepcopy(student.state_dict())
    update_ema_(teacher, student, 0.3)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_buffers_are_left_alone() -> None:
    teacher, student = make_pair()
    student[1].running_mean.fill_(7.0)
    update_ema_(teacher, student, 0.0)
    assert teacher[1].running_mean.tolist() == [0.0] * 4


def test_parameters_are_paired_by_name_not_by_order() -> None:
    teacher = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    student = nn.ModuleDict({"b": copy.deepcopy(teacher["a"]), "a": copy.deepcopy(teacher["b"])})
    update_ema_(teacher, student, 0.0)
    assert torch.equal(teacher["a"].weight, student["a"].weight)
    assert torch.equal(teacher["b"].weight, student["b"].weight)


def test_no_gradient_is_recorded() -> None:
    teacher, student = make_pair()
    update_ema_(teacher, student, 0.5)
    assert all(parameter.is_leaf and parameter.grad is None for parameter in teacher.parameters())


def test_other_names_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"only in the teacher: \['bias'\]"):
        update_ema_(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)


def test_another_shape_is_refused_before_anything_changes() -> None:
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 1)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"'weight'.*\(2, 2\) and \(1, 2\)"):
        update_ema_(teacher, student, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum in"):
        update_ema_(*make_pair(), momentum)


def test_modules_without_parameters_are_fine() -> None:
    update_ema_(nn.Identity(), nn.Identity(), 0.5)
