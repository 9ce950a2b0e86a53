"""Names, shapes and order of the weights are those of the released checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dinov2_equi.hub.backbones import ENTRY_POINTS

NUM_PARAMETERS = {
    "dinov2_vits14": 22_056_576,
    "dinov2_vits14_reg": 22_058_112,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
}


@pytest.mark.parametrize(
    "name",
    ["dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14", "dinov2_vits14_reg", "dinov2_vitg14_reg"],
)
def test_a_released_checkpoint_would_not_load(name: str, load_reference: Callable[[str], Any]) -> None:
    expected = load_reference("tables.json")["released_state_dict_shapes"][name]
    with torch.device("meta"):  # names and shapes without memory
        model = ENTRY_POINTS[name.replace("dinov2", "dinov2_equi")]()
    actual = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert actual == expected
    assert list(actual) == list(expected)
    if name in NUM_PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
