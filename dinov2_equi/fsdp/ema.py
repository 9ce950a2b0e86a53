"""The teacher as an exponential moving average of the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_equi.fsdp.sharding import local_part


def _paired_parameters(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of both modules in one order, matched by name; of sharded ones the rows of this rank.

    Raises:
        ValueError: the names or the shapes differ.
    """
    teacher_params = dict(teacher.named_parameters())
    student_params = dict(student.named_parameters())
    if teacher_params.keys() != student_params.keys():
        raise ValueError(
            "expected teacher and student to have the same parameter names; "
            f"only in the teacher: {sorted(teacher_params.keys() - student_params.keys())[:5]}, "
            f"only in the student: {sorted(student_params.keys() - teacher_params.keys())[:5]}. "
            "Build both with the same architecture and pass only the parts that the teacher has"
        )
    for name, value in teacher_params.items():
        if value.shape != student_params[name].shape:
            raise ValueError(
                f"expected teacher and student to agree in the shape of {name!r}, got {tuple(value.shape)} and "
                f"{tuple(student_params[name].shape)}; build both with the same architecture"
            )
    pairs = [(local_part(teacher_params[name]), local_part(student_params[name])) for name in teacher_params]
    for name, (mine, other) in zip(teacher_params, pairs, strict=True):
        assert mine.shape == other.shape, f"teacher and student are sharded in different ways: {name}"
    return [mine for mine, _ in pairs], [other for _, other in pairs]


@torch.no_grad()
def update_ema_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every teacher parameter to ``momentum * teacher + (1 - momentum) * student``, in place.

    Parameters are paired by name. Buffers are left alone: no module here keeps running statistics, and the centres
    of the losses belong to neither network.

    Args:
        teacher: the module that is updated.
        student: the module it follows; same parameter names and shapes.
        momentum: in [0, 1]; 1 keeps the teacher, 0 copies the student.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or names or shapes differ (nothing is changed then).
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"expected an EMA momentum in [0, 1], got {momentum}")
    teacher_params, student_params = _paired_parameters(teacher, student)
    if not teacher_params:
        return
    torch._foreach_mul_(teacher_params, momentum)
    torch._foreach_add_(teacher_params, student_params, alpha=1.0 - momentum)
