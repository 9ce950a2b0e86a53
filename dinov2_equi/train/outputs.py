"""What student and teacher hand to the losses, with shapes.

`G` = 2 global crops, `L` local crops, `M` masked patches, `K` prototypes; rows are crop-major (all images of the first
crop, then all of the second).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dinov2_equi.equi.tokens import EquiTargets
from dinov2_equi.models.vision_transformer import Features


@dataclass(frozen=True)
class Views:
    """Normalised crops as the networks see them, and what the branch wants back.

    Attributes:
        global_crops: [G*B, 3, H, W]; with the branch on, the second half is the transformed crop.
        local_crops: [L*B, 3, h, w].
        equi_targets: what the branch has to find out, or None where it has no objective.
    """

    global_crops: Tensor
    local_crops: Tensor
    equi_targets: EquiTargets | None


@dataclass(frozen=True)
class TeacherTargets:
    """Targets of the SSL losses; no gradient.

    Attributes:
        dino: [G, B, K] probabilities; entry g holds the *other* crop's assignment, the one crop g must predict.
        ibot: [M, K] probabilities of the masked patches, or None without iBOT.
        dino_mean: [1, K] mean of the raw class-token logits, for the centre.
        ibot_mean: [1, K] mean of the raw patch logits, [0, K] where no patch was masked, or None without iBOT.
    """

    dino: Tensor
    ibot: Tensor | None
    dino_mean: Tensor
    ibot_mean: Tensor | None


@dataclass(frozen=True)
class StudentOutputs:
    """Student features and logits of one pass over all crops.

    Attributes:
        cls_global: [G*B, D_inv] class tokens of the global crops before the head, for KoLeo.
        dino_global: [G*B, K] logits, or None where neither DINO nor iBOT is on.
        dino_local: [L*B, K] logits; L may be 0.
        ibot_masked: [M, K] logits of the masked patches, or None without iBOT.
        vicreg: embeddings of view 1 and view 2, [B, E] each, or None without VICReg.
        features: what the backbone returned for the global crops, and for the local ones where there are any.
    """

    cls_global: Tensor
    dino_global: Tensor | None
    dino_local: Tensor | None
    ibot_masked: Tensor | None
    vicreg: tuple[Tensor, Tensor] | None
    features: list[Features]


@dataclass(frozen=True)
class StepOutput:
    """Result of `SSLMetaArch.forward_backward`.

    Attributes:
        losses: detached scalars by name, `total_loss` included: exactly what was optimised.
        metrics: detached scalars of the branch.
        teacher: the targets, whose means move the centres once the step is known to be sound; None where no loss has
            a teacher.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    teacher: TeacherTargets | None


@dataclass(frozen=True)
class Preview:
    """Reconstructions for people to look at; all images are in [0, 1].

    Attributes:
        view_1: [B, 3, H, W].
        view_2: [B, 3, H, W].
        targets: [S, B, 3, H', W'], at the resolution of the decoder.
        reconstructions: the same shape.
    """

    view_1: Tensor
    view_2: Tensor
    targets: Tensor
    reconstructions: Tensor
