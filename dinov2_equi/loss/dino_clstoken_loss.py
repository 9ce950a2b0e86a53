"""Self-distillation loss on class tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.loss.centering import centered_softmax, update_center_
from dinov2_equi.loss.sinkhorn import sinkhorn_knopp


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's prototype assignments of an image.

    Source: "Emerging Properties in Self-Supervised Vision Transformers", Caron et al. 2021, Equations 1 to 4.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        """Start with a zero centre for `out_dim` prototypes K."""
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Return the teacher's probabilities [B, K] float32 of logits [B, K]; the centre stays as it is."""
        return centered_softmax(teacher_output, self.center, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Return Sinkhorn assignments [B, K] float32 of logits [B, K]. Every rank must call it."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """Return the sum over all pairs (student crop, teacher crop) of the mean cross-entropy.

        The plain form::

            sum(-(t * log_softmax(s / student_temp)).sum(-1).mean() for s in students for t in teachers)

        Args:
            student_output_list: logits [B, K], one tensor for each crop; may be empty.
            teacher_out_softmaxed_centered_list: probabilities [B, K], one tensor for each crop (or stacked).

        Returns:
            A float32 scalar; 0 where there is no pair or no image.
        """
        teachers = list(teacher_out_softmaxed_centered_list)
        total = self.center.new_zeros((), dtype=torch.float32)
        if not teachers:
            return total
        # The cross-entropy is linear in the teacher, so the teachers can be summed first.
        teacher_sum = torch.stack([teacher.float() for teacher in teachers]).sum(dim=0)  # [B, K]
        for student in student_output_list:
            log_probs = functional.log_softmax(student.float() / self.student_temp, dim=-1)  # [B, K]
            total = total - (teacher_sum * log_probs).sum() / max(student.shape[0], 1)
        return total

    def update_center(self, teacher_output: Tensor) -> None:
        """Move the centre towards the mean of the teacher's logits [B, K]. Every rank must call it.

        Call it once a step, after the loss was found to be finite: a centre cannot recover from NaN.
        """
        update_center_(self.center, teacher_output, self.center_momentum)
