"""The linear detection probe: what one linear layer a map reads of the objects in patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from dinov2_equi.evaluation.dense.feature_pyramid import LevelMaps

_FIRST_DISTANCE = 4.0
"""Distance from a place to the sides of its box before training, in strides: FCOS gives a map up to 8 of them."""

_PRIOR = 0.01
"""Score of every class before training, so that the many places without an object do not drown the others."""


class LinearHead(FCOSHead):  # type: ignore[misc]  # torchvision has no types
    """Classes, boxes and centredness by one linear layer for each map; targets and losses are those of FCOS.

    The distances to the four sides of a box are what the layer gives, in strides, through a softplus that keeps them
    positive. FCOS takes the exponential: with a step that is too large all boxes then shrink to nothing, for good.

    Args:
        channels: of the maps.
        num_maps: how many there are.
        num_classes: without a background.

    Source: Tian et al. 2019 (FCOS, arXiv 1904.01355).
    """

    def __init__(self, channels: int, num_maps: int, num_classes: int) -> None:
        super().__init__(channels, 1, num_classes, num_convs=0)
        del self.classification_head, self.regression_head
        self.num_classes = num_classes
        self.layers = nn.ModuleList(nn.Conv2d(channels, num_classes + 5, 1) for _ in range(num_maps))
        for layer in self.layers:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            with torch.no_grad():
                layer.bias[:num_classes] = -math.log((1 - _PRIOR) / _PRIOR)
                layer.bias[num_classes:-1] = math.log(math.expm1(_FIRST_DISTANCE))  # softplus of it is the distance
                layer.bias[-1] = 0.0

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Return logits [B, n, classes], distances [B, n, 4] in strides, and logits of centredness [B, n, 1].

        Args:
            x: maps [B, D, h, w], finest first; n counts the places of all of them.
        """
        pairs = zip(self.layers, x, strict=True)
        outputs = torch.cat([layer(level).flatten(2).transpose(1, 2) for layer, level in pairs], dim=1)
        logits, distances, centredness = outputs.split([self.num_classes, 4, 1], dim=2)
        return {"cls_logits": logits, "bbox_regression": F.softplus(distances), "bbox_ctrness": centredness}


def linear_detector(maps: LevelMaps, strides: Sequence[int], options: dict[str, Any]) -> nn.Module:
    """Return FCOS with linear heads.

    Args:
        maps: what it looks at.
        strides: of the maps, pixels.
        options: of torchvision's FCOS.
    """
    points = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    head = LinearHead(maps.out_channels, len(strides), options["num_classes"])
    return FCOS(maps, anchor_generator=points, head=head, **options)  # type: ignore[no-any-return]
