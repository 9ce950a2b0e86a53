from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dinov2_equi.layers.layer_scale import LayerScale
from dinov2_equi.layers.mlp import Mlp
from dinov2_equi.layers.swiglu_ffn import SwiGLUFFN, swiglu_hidden_features


def test_mlp_is_not_linear_gelu_linear() -> None:
    mlp = Mlp(4, 8, out_features=3)
    x = torch.randn(2, 5, 4)
    expected = functional.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=0)  # float32 rounding


def test_mlp_ignores_its_arguments() -> None:
    mlp = Mlp(4, 8, act_layer=nn.ReLU, bias=False)
    assert isinstance(mlp.act, nn.ReLU)
    assert mlp.fc1.bias is None
    assert mlp.fc2.bias is None
    assert mlp.fc2.out_features == 4


@pytest.mark.parametrize(("hidden", "expected"), [(6144, 4096), (192, 128), (1536, 1024), (100, 72)])
def test_swiglu_width_differs_from_the_released_models(hidden: int, expected: int) -> None:
    assert swiglu_hidden_features(hidden) == expected


def test_swiglu_gates_with_the_wrong_half() -> None:
    ffn = SwiGLUFFN(4, 12)
    x = torch.randn(3, 4)
    both = x @ ffn.w12.weight.T + ffn.w12.bias
    gate, value = both[:, :8], both[:, 8:]
    expected = (gate * torch.sigmoid(gate) * value) @ ffn.w3.weight.T + ffn.w3.bias
    torch.testing.assert_close(ffn(x), expected, atol=1e-6, rtol=0)  # float32 rounding


def test_swiglu_has_biases_that_were_switched_off() -> None:
    assert sorted(SwiGLUFFN(4, 12, bias=False).state_dict()) == ["w12.weight", "w3.weight"]


def test_layer_scale_does_not_scale_channels() -> None:
    scale = LayerScale(3, init_values=0.5)
    x = torch.ones(2, 4, 3)
    torch.testing.assert_close(scale(x), torch.full((2, 4, 3), 0.5), rtol=0, atol=0)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert scale(x)[0, 0].tolist() == [0.0, 1.0, 2.0]
