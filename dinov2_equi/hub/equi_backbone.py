"""A backbone that knows which of its channels are invariant and which equivariant."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.models.vision_transformer import DinoVisionTransformer


class SplitFeatures(NamedTuple):
    """Both parts of the class token and of the patch tokens."""

    invariant_clstoken: Tensor
    """[B, D_inv]."""

    invariant_patchtokens: Tensor
    """[B, N, D_inv]."""

    equivariant_clstoken: Tensor
    """[B, D_equi]."""

    equivariant_patchtokens: Tensor
    """[B, N, D_equi]."""


class EquiVisionTransformer(DinoVisionTransformer):
    """DINOv2's vision transformer, with the split of its features where its weights have one.

    Attributes:
        feature_split: divides the channels; None for weights of another training.
        split_block: block whose tokens hold the equivariant part, counted from 0; None for the last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the transformer without a split; the arguments are those of `DinoVisionTransformer`."""
        super().__init__(*args, **kwargs)
        self.feature_split: FeatureSplit | None = None
        self.split_block: int | None = None

    def split_features(self, x: Tensor) -> SplitFeatures:
        """Return the invariant and the equivariant part of the tokens of normalised images [B, 3, H, W].

        Raises:
            ValueError: if the weights have no such parts.
        """
        if self.feature_split is None:
            raise ValueError(
                "these weights have no equivariant part: they are of a training without the branch, or the file holds "
                "the backbone alone; load the teacher_checkpoint.pth of a run with equi.family set"
            )
        more_blocks = () if self.split_block is None else (self.split_block,)
        features = self.forward_features(x, more_blocks=more_blocks)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        equi_cls, equi_patches = cls, patches
        if more_blocks:
            (tokens,) = features["x_norm_blocks"]  # [B, T, D]: class token first, patches last
            equi_cls, equi_patches = tokens[:, 0], tokens[:, -patches.shape[1] :]
        split = self.feature_split
        return SplitFeatures(
            split.invariant(cls), split.invariant(patches), split.equivariant(equi_cls), split.equivariant(equi_patches)
        )
