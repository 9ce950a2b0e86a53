"""Positions by matrices against PyTorch's interpolation."""

from __future__ import annotations

import pytest
import torch

from dinov2_equi.hub.any_size import positions_of_any_size
from dinov2_equi.models.registry import build_backbone


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (16, 24), (8, 32), (32, 64), (200, 8)])
def test_positions_differ_from_those_of_the_backbone(offset: float, antialias: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_test_tiny", img_size=32, patch_size=8, interpolate_offset=offset, interpolate_antialias=antialias
    )
    torch.nn.init.normal_(backbone.pos_embed)
    with torch.no_grad():
        found, expected = positions_of_any_size(backbone, *size), backbone.interpolate_pos_encoding(*size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, values of order 1
