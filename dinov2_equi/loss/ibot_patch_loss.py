"""Self-distillation loss on masked patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.loss.centering import centered_softmax, update_center_
from dinov2_equi.loss.sinkhorn import sinkhorn_knopp


class iBOTPatchLoss(nn.Module):
    """Cross-entropy between the teacher's view of a patch and the student's guess behind the mask.

    Source: "iBOT: Image BERT Pre-Training with Online Tokenizer", Zhou et al. 2022, Equation 2.
    """

    center: Tensor

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        """Start with a zero centre for `patch_out_dim` prototypes K."""
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, 1, patch_out_dim))

    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor:
        """Return the teacher's probabilities [M, K] float32 of logits [M, K]; the centre stays as it is."""
        return centered_softmax(teacher_patch_tokens, self.center, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Return Sinkhorn assignments [M, K] float32 of logits [M, K]; M may be 0. Every rank must call it."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        masks_weight: Tensor,
        num_samples: int,
    ) -> Tensor:
        """Return the weighted cross-entropy of the masked patches over the number of images.

        Args:
            student_patch_tokens_masked: logits [M, K]; M may be 0.
            teacher_patch_tokens_masked: probabilities [M, K].
            masks_weight: [M], one over the number of masked patches of the image the patch is in.
            num_samples: number of images, also those without a mask.

        Returns:
            A float32 scalar attached to the graph of the student, 0 where no patch is masked.

        Raises:
            ValueError: if the sizes do not agree or there is no image.
        """
        num_masked = student_patch_tokens_masked.shape[0]
        if teacher_patch_tokens_masked.shape[0] != num_masked or masks_weight.shape != (num_masked,) or num_samples < 1:
            raise ValueError(
                "expected student [M, K], teacher [M, K], weights [M] and num_samples >= 1, got "
                f"{list(student_patch_tokens_masked.shape)}, {list(teacher_patch_tokens_masked.shape)}, "
                f"{list(masks_weight.shape)}, {num_samples}"
            )
        log_probs = functional.log_softmax(student_patch_tokens_masked.float() / self.student_temp, dim=-1)  # [M, K]
        cross_entropy = -(teacher_patch_tokens_masked.float() * log_probs).sum(dim=-1)  # [M]
        return (cross_entropy * masks_weight.float()).sum() / num_samples

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Move the centre towards the mean of the teacher's logits [M, K]. Every rank must call it.

        Without a masked patch on any rank the centre stays. Call it once a step, after the loss was found to be finite.
        """
        update_center_(self.center, teacher_patch_tokens, self.center_momentum)
