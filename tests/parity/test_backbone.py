"""Backbone outputs equal those of the official DINOv2 code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact

FILES = ("vit_plain.pt", "vit_registers.pt", "vit_swiglu.pt")

# float32 sums in another order; outputs are of order 1 and pass through three blocks. Measured: 2.2e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=FILES)
def recorded(request: pytest.FixtureRequest, load_reference: Callable[[str], Any]) -> dict[str, Any]:
    return load_reference(request.param)


@pytest.fixture(scope="module")
def model(recorded: dict[str, Any]) -> DinoVisionTransformer:
    model = DinoVisionTransformer(**recorded["arch"], init_values=1.0, block_chunks=0)
    load_exact(model, recorded["state_dict"])
    return model.eval()


def assert_same_features(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=0)


def test_keys_and_their_order_differ(model: DinoVisionTransformer, recorded: dict[str, Any]) -> None:
    assert list(model.state_dict()) == list(recorded["state_dict"])


@pytest.mark.parametrize("index", range(5))
@torch.no_grad()
def test_features_differ_at_some_image_size(model: DinoVisionTransformer, recorded: dict[str, Any], index: int) -> None:
    call = recorded["calls"][index]
    assert tuple(call["input"].shape[2:]) == tuple(call["hw"])
    assert_same_features(model.forward_features(call["input"]), call["output"])


@pytest.mark.parametrize("index", range(5))
@torch.no_grad()
def test_intermediate_layers_differ(model: DinoVisionTransformer, recorded: dict[str, Any], index: int) -> None:
    call = recorded["calls"][index]
    layers = model.get_intermediate_layers(call["input"], n=2, reshape=True, return_class_token=True)
    assert len(layers) == len(call["intermediate_last2"]) == 2
    for (patches, class_token), (expected_patches, expected_class_token) in zip(
        layers, call["intermediate_last2"], strict=True
    ):
        torch.testing.assert_close(patches, expected_patches, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(class_token, expected_class_token, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_masked_features_differ(model: DinoVisionTransformer, recorded: dict[str, Any]) -> None:
    call = recorded["masked_call"]
    features = model(call["input"], masks=call["masks"], is_training=True)
    assert_same_features(features, call["output"])
    assert features["masks"] is call["masks"]


@torch.no_grad()
def test_features_of_two_crop_sizes_at_once_differ(model: DinoVisionTransformer, recorded: dict[str, Any]) -> None:
    call = recorded["list_call"]
    features = model(call["inputs"], masks=call["masks"], is_training=True)
    for actual, expected in zip(features, call["outputs"], strict=True):
        assert_same_features(actual, expected)
