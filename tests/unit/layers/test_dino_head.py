from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dinov2_equi.layers.dino_head import DINOHead, WeightNormLinear


def test_the_length_of_weight_v_matters() -> None:
    layer = WeightNormLinear(4, 3)
    x = torch.randn(2, 4)
    before = layer(x)
    with torch.no_grad():
        layer.weight_v *= torch.tensor([[2.0], [0.01], [300.0]])
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=0)  # float32 rounding


def test_weight_norm_differs_from_torch() -> None:
    layer = WeightNormLinear(4, 3)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2.0)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(layer.weight_g)
        reference.parametrizations.weight.original1.copy_(layer.weight_v)
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer(x), reference(x), atol=1e-6, rtol=1e-5)  # float32 rounding
    torch.testing.assert_close(
        layer.weight_v.grad, reference.parametrizations.weight.original1.grad, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        layer.weight_g.grad, reference.parametrizations.weight.original0.grad, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("nlayers", "names"),
    [
        (1, ["mlp.bias", "mlp.weight"]),
        (2, ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"]),
        (3, ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight", "mlp.4.bias", "mlp.4.weight"]),
    ],
)
def test_names_differ_from_dinov2(nlayers: int, names: list[str]) -> None:
    head = DINOHead(8, 6, nlayers=nlayers, hidden_dim=10, bottleneck_dim=4)
    assert sorted(head.state_dict()) == ["last_layer.weight_g", "last_layer.weight_v", *names]
    assert head(torch.randn(3, 8)).shape == (3, 6)


def test_initial_weights_differ_from_dinov2() -> None:
    head = DINOHead(256, 64, hidden_dim=128, bottleneck_dim=32)
    assert (head.last_layer.weight_g == 1).all()
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)  # 32768 draws
    assert (head.mlp[0].bias == 0).all()


def test_logits_are_not_cosines_at_the_start() -> None:
    head = DINOHead(8, 6, hidden_dim=10, bottleneck_dim=4)
    x = torch.randn(3, 8)
    expected = functional.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=0)  # torch's cosine has an eps of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_token_becomes_nan(dtype: torch.dtype) -> None:
    head = DINOHead(8, 6, hidden_dim=10, bottleneck_dim=4).to(dtype)
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    logits = head(x)
    logits.float().sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(x.grad).all()


def test_no_layer_is_accepted() -> None:
    with pytest.raises(ValueError, match="nlayers >= 1, got 0"):
        DINOHead(8, 6, nlayers=0)


def test_biases_are_there_that_were_switched_off() -> None:
    assert not any("bias" in name for name in DINOHead(8, 6, mlp_bias=False).state_dict())
