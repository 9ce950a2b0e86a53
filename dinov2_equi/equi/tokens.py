"""What the branch is given of a view, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EquiTokens:
    """Equivariant features of one view.

    Attributes:
        patches: [B, N, D_equi].
        cls: [B, D_equi], or None where the class token takes no part.
    """

    patches: Tensor
    cls: Tensor | None = None


@dataclass(frozen=True)
class EquiTargets:
    """What the branch has to find out from the tokens.

    Attributes:
        images: [S, B, 3, H, W] float32 in [0, 1], un-normalised; S = 0 where theta is wanted.
        theta: [B, P] float32 in [-1, 1], the parameters as a share of their range.
        weights: [B, N] or [B, 1], non-negative, how much each patch counts; None: all the same.
        chosen: [B, n] int64, the patches of each image that are drawn; None: all.
    """

    images: Tensor
    theta: Tensor
    weights: Tensor | None = None
    chosen: Tensor | None = None


@dataclass(frozen=True)
class EquiOutput:
    """Result of the branch.

    Attributes:
        loss: float32 scalar.
        metrics: detached scalars for the log.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
