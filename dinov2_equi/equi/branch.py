"""The branch as the meta-architecture sees it: views before the encoder, an objective after it."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_equi.equi.families.base import TransformFamily
from dinov2_equi.equi.sampling import draw_patches, draw_theta
from dinov2_equi.equi.targets import Target
from dinov2_equi.equi.tokens import EquiOutput, EquiTargets, EquiTokens
from dinov2_equi.equi.views import EquiViews, make_views


class EquivarianceBranch(nn.Module):
    """Transform the second global crop, and find the images on the way to it in the equivariant features.

    Without an objective only the transform is applied: the control run that separates the effect of more augmentation
    from the effect of the reconstruction. Only the objective holds parameters; it has no teacher.
    """

    def __init__(
        self,
        family: TransformFamily,
        objective: nn.Module | None,
        *,
        target: Target,
        num_steps: int = 2,
        include_final: bool = False,
        only_unmasked: bool = False,
        patch_fraction: float = 1.0,
    ) -> None:
        """Join a transform family and an objective.

        Args:
            family: what happens to the second view.
            objective: from the tokens of both views and `EquiTargets` to `EquiOutput`; None: control run.
            target: which images the objective has to draw.
            num_steps: S, number of images between the views, at least 1.
            include_final: draw the second view as well.
            only_unmasked: count only the images of which no patch is hidden in either view.
            patch_fraction: share of the patches that are drawn in a training step, in (0, 1]; below 1 the decoder
                must have `decode_patches`.

        Raises:
            ValueError: if `num_steps` is below 1.
        """
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"the path needs at least one intermediate image, got num_steps={num_steps}")
        self.family = family
        self.objective = objective
        self.target = target
        self.num_steps = num_steps if objective is not None and target.is_path else 0
        self.include_final = include_final
        self.only_unmasked = only_unmasked
        self.patch_fraction = patch_fraction

    def num_drawn_patches(self, num_patches: int) -> int:
        """Return how many of `num_patches` patches of an image are reconstructed in a training step, at least one."""
        return max(1, round(self.patch_fraction * num_patches))

    def make_views(self, crops: Tensor, positions: Tensor, seed: int) -> EquiViews:
        """Return view 2 and the path of crops [B, 3, H, W] in [0, 1] at sample positions [B] of a seeded run."""
        theta = draw_theta(self.family, positions, seed)  # [B, P]
        return make_views(crops, self.family, theta, self.num_steps, include_final=self.include_final)

    def make_targets(
        self, crops_1: Tensor, crops_2: Tensor, views: EquiViews, masks: Tensor, *, positions: Tensor, seed: int
    ) -> EquiTargets:
        """Return what the objective has to find.

        Args:
            crops_1: [B, 3, H, W] in [0, 1], view 1.
            crops_2: [B, 3, H, W] in [0, 1], the second crop before the transform.
            views: what `make_views` made of it.
            masks: [2 * B, N] bool, patches hidden from the student, those of view 1 first.
            positions: [B] sample positions.
            seed: of the run.
        """
        masks_1, masks_2 = masks.chunk(2)  # [B, N]
        weights = None
        if self.target.masked_alone:
            weights = masks_1.float()
        elif self.only_unmasked:
            weights = (~(masks_1 | masks_2).any(dim=1, keepdim=True)).float()  # [B, 1]
        chosen = None
        num_patches = masks_1.shape[1]
        if (count := self.num_drawn_patches(num_patches)) < num_patches:
            chosen = draw_patches(positions, seed, num_patches=num_patches, count=count).to(crops_1.device)
        theta = self.family.normalized(views.theta).to(crops_1.device)
        return EquiTargets(self.target.images(crops_1, crops_2, views), theta, weights, chosen)

    def forward(self, view_1: EquiTokens, view_2: EquiTokens, targets: EquiTargets) -> EquiOutput:
        """Return the loss of the objective.

        Raises:
            ValueError: if there is none.
        """
        if self.objective is None:
            raise ValueError("this branch has no objective (equi.loss_weight is 0): nothing can be reconstructed")
        output: EquiOutput = self.objective(view_1, view_2, targets)
        return output
