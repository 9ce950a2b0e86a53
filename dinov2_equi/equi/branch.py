"""The branch as the meta-architecture sees it: views before the encoder, reconstruction after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dinov2_equi.equi.decoder import TransformerDecoder
from dinov2_equi.equi.families import TransformFamily
from dinov2_equi.equi.loss import reconstruction_error
from dinov2_equi.equi.metrics import reconstruction_metrics
from dinov2_equi.equi.sampling import draw_theta, make_path
from dinov2_equi.equi.views import EquiViews, make_views


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
class EquiOutput:
    """Result of the branch.

    Attributes:
        loss: float32 scalar, mean over path steps of the mean squared error.
        metrics: detached scalars for the log.
        reconstructions: [S, B, 3, H, W] float32 in (0, 1).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    reconstructions: Tensor


class EquivarianceBranch(nn.Module):
    """Transform the second global crop, and reconstruct the images on the way from the equivariant features.

    Without a decoder only the transform is applied: the control run that separates the effect of more augmentation
    from the effect of the reconstruction. Only the decoder holds parameters; it has no teacher.
    """

    def __init__(self, family: TransformFamily, num_steps: int, decoder: TransformerDecoder | None) -> None:
        """Join a transform family, the number S of intermediate images, and a decoder (None: control run)."""
        super().__init__()
        self.family = family
        self.num_steps = num_steps
        self.decoder = decoder

    def make_views(self, crops: Tensor, positions: Tensor, seed: int) -> EquiViews:
        """Return view 2 and the targets of crops [B, 3, H, W] in [0, 1] at sample positions [B] of a seeded run."""
        theta = draw_theta(self.family, positions, seed)  # [B, P]
        return make_views(crops, self.family, make_path(self.family, theta, self.num_steps))

    def reconstruct(self, view_1: EquiTokens, view_2: EquiTokens, size: tuple[int, int]) -> Tensor:
        """Return the images [S, B, 3, H, W] between the views, `size` = (H, W).

        Raises:
            ValueError: if the number of tokens is not the patch grid of `size`; names both.
        """
        if self.decoder is None:
            raise ValueError("this branch has no decoder (equi.loss_weight is 0): nothing can be reconstructed")
        p = self.decoder.patch_size
        grid = (size[0] // p, size[1] // p)
        if view_1.patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"expected {grid[0]} x {grid[1]} patch tokens for a {size[0]} x {size[1]} image at patch size {p}, "
                f"got {view_1.patches.shape[1]}"
            )
        cls = None if view_1.cls is None or view_2.cls is None else (view_1.cls, view_2.cls)
        images: Tensor = self.decoder(view_1.patches, view_2.patches, grid, cls)
        return images

    def forward(self, view_1: EquiTokens, view_2: EquiTokens, targets: Tensor) -> EquiOutput:
        """Return the reconstruction loss of targets [S, B, 3, H, W] in [0, 1] from both views' features."""
        reconstructions = self.reconstruct(view_1, view_2, (targets.shape[-2], targets.shape[-1]))
        errors = reconstruction_error(reconstructions, targets)  # [S]
        return EquiOutput(errors.mean(), reconstruction_metrics(errors), reconstructions.detach())
