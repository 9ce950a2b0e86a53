"""Maps of several resolutions from the last block alone: the simple feature pyramid, and one without any layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.dense.maps import DenseBackbone, last_blocks, upsample
from dinov2_equi.evaluation.dense.windows import Windows
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.layers.batch_norm import BatchNorm2d

_STRIDES_OF_PATCHES = (4, 8, 16, 32)
_DEFAULT_STRIDE = 16


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, normalised at every place."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _level(width: int, channels: int, factor: float) -> nn.Sequential:
    """Return layers that change the resolution by a power of two and the width to `channels`."""
    layers: list[nn.Module] = []
    for step in range(max(round(math.log2(factor)), 0)):
        narrower = max(width // 2, 8)
        layers += [MapNorm(width), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, narrower, 2, stride=2))
        width = narrower
    if factor < 1:
        layers.append(nn.MaxPool2d(round(1 / factor)))
    layers += [nn.Conv2d(width, channels, 1, bias=False), MapNorm(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), MapNorm(channels)]
    return nn.Sequential(*layers)


class LevelMaps(nn.Module):
    """A backbone for torchvision's detectors: maps of given strides, all made from the patch tokens of the last block.

    The strides are exact, which torchvision's anchors and region pooling take for granted. With patches of 4, 8, 16 or
    32 pixels the map is used as it is; with others (14) the image is resized so that its patches lie 16 pixels apart.

    Args:
        model: the backbone.
        strides: pixels from one place of a map to the next, powers of two, ascending.
        num_pooled: further maps, each half the resolution of the one before it.
        channels: of all maps; 0: those of the tokens.
        is_frozen: see `DenseBackbone`.
        windows: see `DenseBackbone`.
    """

    def __init__(
        self,
        model: EvalModel,
        strides: Sequence[int],
        num_pooled: int,
        channels: int,
        *,
        is_frozen: bool = True,
        windows: Windows | None = None,
    ) -> None:
        super().__init__()
        self.features = DenseBackbone(model, last_blocks(model, 1), is_frozen=is_frozen, windows=windows)
        patch = model.patch_size
        self.stride = patch if patch in _STRIDES_OF_PATCHES else _DEFAULT_STRIDE
        ((self.width, _),) = self.features.widths()
        self.strides = tuple(strides)
        self.num_pooled = num_pooled
        self.out_channels = channels or self.width
        self.size_divisible = strides[-1] * 2**num_pooled

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps of normalised images [B, 3, H, W], finest first, by the names "0", "1", ...

        H and W are multiples of `size_divisible`.
        """
        found = self._maps(self._last_map(images))
        for _ in range(self.num_pooled):
            found.append(F.max_pool2d(found[-1], kernel_size=1, stride=2))
        return OrderedDict((str(number), level) for number, level in enumerate(found))

    def _maps(self, tokens: Tensor) -> list[Tensor]:
        """Return the map of each stride from patch tokens [B, D, h, w]."""
        raise NotImplementedError

    def _last_map(self, images: Tensor) -> Tensor:
        """Return the patch tokens [B, D, H / stride, W / stride]."""
        grid = [side // self.stride for side in images.shape[-2:]]
        patch = self.features.patch_size
        if patch not in (1, self.stride):
            images = upsample(images, [side * patch for side in grid])
        maps = self.features.maps_of_normalized(images)[0].patches
        return maps if list(maps.shape[-2:]) == grid else upsample(maps, grid)


class SimpleFeaturePyramid(LevelMaps):
    """Maps from the last block by a few convolutions each.

    Source: Li et al. 2022 (ViTDet, arXiv 2203.16527), figure 2c.
    """

    def __init__(
        self, model: EvalModel, strides: Sequence[int], num_pooled: int, channels: int, **of_backbone: Any
    ) -> None:
        super().__init__(model, strides, num_pooled, channels, **of_backbone)
        self.levels = nn.ModuleList(_level(self.width, channels, self.stride / stride) for stride in strides)

    def _maps(self, tokens: Tensor) -> list[Tensor]:
        return [level(tokens) for level in self.levels]


class ResampledMaps(LevelMaps):
    """Maps of the tokens themselves, standardised: enlarged bilinearly or averaged, so nothing is added to them.

    What a linear layer makes of such a map, it makes of the tokens.
    """

    def __init__(self, model: EvalModel, strides: Sequence[int], **of_backbone: Any) -> None:
        super().__init__(model, strides, 0, 0, **of_backbone)
        self.norm = BatchNorm2d(self.width, has_running_stats=True)

    def _maps(self, tokens: Tensor) -> list[Tensor]:
        tokens = self.norm(tokens)
        height, width = (side * self.stride for side in tokens.shape[-2:])
        sizes = [(height // stride, width // stride) for stride in self.strides]
        return [
            upsample(tokens, size) if stride < self.stride else F.adaptive_avg_pool2d(tokens, size)
            for stride, size in zip(self.strides, sizes, strict=True)
        ]
