"""One shape for every backbone that is evaluated: ours, DINOv2's, timm's, transformers'.

What a harness has to know about a backbone beside its weights, normalisation, resolution, patch size, and which
channels are the equivariant ones, travels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_equi.data.datasets.channels import ChannelFormat, channel_format
from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.evaluation.features import eval_mode, image_pieces

DEFAULT_IMAGE_SIZE = 224
"""Pixels of an evaluation image where the weights say nothing better, rounded down to whole patches."""

PLAIN_FEATURES = ("cls", "patch_mean", "both")
HALF_FEATURES = ("invariant", "equivariant")
"""Features of a backbone whose channels are divided: each half of the class token and of the mean patch token."""


class Tokens(NamedTuple):
    """Normalised output tokens of a batch."""

    cls: Tensor
    """[B, D]."""

    patches: Tensor
    """[B, N, D]."""


class BlockTokens(NamedTuple):
    """What a classifier may see of a batch."""

    cls: Tensor
    """[B, n, D] class tokens of the last n blocks, the last one last."""

    patch_mean: Tensor
    """[B, D] mean patch token of the last block."""


@dataclass(frozen=True)
class EvalModel:
    """A frozen backbone with what is needed to feed it and to read it.

    Attributes:
        name: how tables and figures call it.
        backbone: `forward_features(x)` returns a dict with `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D].
        patch_size: sides of the images must be multiples of it, pixels; 1 where any size will do.
        image_size: side of the images it is evaluated on unless told otherwise, pixels.
        mean: of the channels, taken off before the backbone.
        std: of the channels, divided by.
        split: divides the channels into an invariant and an equivariant part; None where there are no such parts.
        split_block: block whose tokens hold the equivariant part, counted from 0; None for the last.
        families: ranges and fill of the transforms that it was trained with; None where it was trained without.
        channels: how the files of its images are read; None: as photographs.
    """

    name: str
    backbone: nn.Module
    patch_size: int
    image_size: int = DEFAULT_IMAGE_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    split: FeatureSplit | None = None
    split_block: int | None = None
    families: FamilySettings | None = None
    channels: ChannelFormat | None = None

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names that `features` and `select_features` know for this backbone."""
        return PLAIN_FEATURES if self.split is None else PLAIN_FEATURES + HALF_FEATURES

    def to(self, device: torch.device | str) -> EvalModel:
        """Move the weights to a device; returns the model itself."""
        self.backbone.to(device)
        if self.split is not None:
            self.split.to(device)
        return self

    def check_size(self, size: int) -> None:
        """Refuse images that cannot be cut into whole patches.

        Raises:
            ValueError: names the nearest sizes that can.
        """
        if size < self.patch_size or size % self.patch_size:
            below = max(size // self.patch_size, 1) * self.patch_size
            raise ValueError(
                f"{self.name} needs images whose side is a multiple of its patch size {self.patch_size}, got {size}; "
                f"try {below} or {below + self.patch_size}"
            )

    @property
    def num_blocks(self) -> int:
        """How many of its last blocks can be read, at least the last."""
        return int(getattr(self.backbone, "n_blocks", 1))

    def block_tokens(self, images: Tensor, n: int) -> BlockTokens:
        """Return class tokens of the last n blocks and the mean patch token of the last, of images in [0, 1].

        Args:
            images: [B, C, H, W] in [0, 1], not normalised, on the backbone's device.
            n: from 1 to `num_blocks`.

        Raises:
            ValueError: for more blocks than there are.
        """
        if not 1 <= n <= self.num_blocks:
            raise ValueError(f"{self.name} gives the tokens of 1 to {self.num_blocks} blocks, asked for {n}")
        if n == 1:
            cls, patches = self.tokens(images)
            return BlockTokens(cls.unsqueeze(1).float(), patches.mean(dim=1).float())
        with eval_mode(self.backbone):
            outputs = self.backbone.get_intermediate_layers(  # type: ignore[operator]
                normalize(images, self.mean, self.std), n=n, return_class_token=True
            )
        cls = torch.stack([token for _, token in outputs], dim=1)  # [B, n, D]
        return BlockTokens(cls.float(), outputs[-1][0].mean(dim=1).float())

    def tokens(self, images: Tensor) -> Tokens:
        """Return the tokens of images [B, C, H, W] in [0, 1], not normalised, on the backbone's device."""
        with eval_mode(self.backbone):
            output = self.backbone.forward_features(normalize(images, self.mean, self.std))  # type: ignore[operator]
        return Tokens(output["x_norm_clstoken"], output["x_norm_patchtokens"])

    def features(
        self,
        images: Tensor | Iterable[Tensor],
        *,
        device: torch.device | str,
        batch_size: int = 64,
        on_batch: Callable[[], None] | None = None,
    ) -> dict[str, Tensor]:
        """Return pooled features of images: one pass, from which `select_features` makes every choice of features.

        Args:
            images: [n, 3, H, W] in [0, 1], not normalised, or an iterable of such batches.
            device: where the backbone lives and runs.
            batch_size: images in one forward pass.
            on_batch: called after each forward pass.

        Returns:
            `cls` and `patch_mean` [n, D], and where the channels are divided `invariant` and `equivariant`, each of the
            class token and the mean patch token one after the other; float32 on the CPU.

        Raises:
            ValueError: for images that are not [n, C, H, W], or no image at all.
        """
        batches: list[dict[str, Tensor]] = []
        with eval_mode(self.backbone):
            for batch in image_pieces(images, batch_size):
                pooled = self._pooled(normalize(batch.to(device), self.mean, self.std))
                batches.append({name: feature.float().cpu() for name, feature in pooled.items()})
                if on_batch is not None:
                    on_batch()
        if not batches:
            raise ValueError("expected at least one image to take features of, got none; check the data set")
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _pooled(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of one normalised batch."""
        options = {} if self.split_block is None else {"more_blocks": (self.split_block,)}
        output = self.backbone.forward_features(images, **options)  # type: ignore[operator]
        cls, patches = output["x_norm_clstoken"], output["x_norm_patchtokens"]
        pooled = {"cls": cls, "patch_mean": patches.mean(dim=1)}  # [B, D] each
        if self.split is None:
            return pooled
        # The split is linear: a half of the mean token is the mean of the halves.
        sources = equi_sources = tuple(pooled.values())
        if self.split_block is not None:
            (tokens,) = output["x_norm_blocks"]  # [B, T, D]: class token first, patches last
            equi_sources = (tokens[:, 0], tokens[:, -patches.shape[1] :].mean(dim=1))
        return pooled | {
            "invariant": torch.cat([self.split.invariant(source) for source in sources], dim=1),
            "equivariant": torch.cat([self.split.equivariant(source) for source in equi_sources], dim=1),
        }


def select_features(features: dict[str, Tensor], name: str) -> Tensor:
    """Return the features called `name`, [n, F]: one that `EvalModel.features` made, or `both`, class token first.

    Raises:
        ValueError: for an unknown name, or a half of a backbone that is not divided.
    """
    if name == "both":
        return torch.cat([features["cls"], features["patch_mean"]], dim=1)
    if name not in features:
        raise ValueError(f"no features {name!r}; this backbone has {', '.join(('both', *features))}")
    return features[name]


def shared_channels(models: Sequence[EvalModel]) -> ChannelFormat | None:
    """Return how files are read for backbones that are to see the same images; None: as photographs.

    Raises:
        ValueError: they are to be read in different ways, or it is not known how; names the backbones.
    """
    formats = {model.name: _channels_of(model) for model in models}
    if len(set(formats.values())) > 1:
        shown = ", ".join(f"{name} {'photographs' if form is None else form}" for name, form in formats.items())
        raise ValueError(f"the backbones read different images ({shown}): measure them one by one")
    return next(iter(formats.values()), None)


def check_photographs(model: EvalModel) -> None:
    """Refuse a backbone of other images where a harness has photographs alone.

    Raises:
        ValueError: names its channels, and what measures it.
    """
    channels = _channels_of(model)
    if channels is not None:
        raise ValueError(
            f"{model.name} reads {channels}, and this measurement has photographs of red, green and blue alone: "
            "classification/run.py and knn.py, equivariance, homography and run/extract.py take such images"
        )


def _channels_of(model: EvalModel) -> ChannelFormat | None:
    """Return how a backbone's files are read."""
    width = getattr(getattr(model.backbone, "patch_embed", None), "in_chans", len(model.mean))
    if width != len(model.mean):
        raise ValueError(
            f"{model.name} reads images of {width} channels, and weights alone do not say their mean, deviation and "
            "range: give the run folder, whose configuration does"
        )
    return model.channels or channel_format(len(model.mean), None)


def default_image_size(trained_size: int, patch_size: int) -> int:
    """Return the size to evaluate at: the trained one, at most 224 pixels, in whole patches and at least one."""
    return max(min(trained_size, DEFAULT_IMAGE_SIZE) // patch_size, 1) * patch_size
