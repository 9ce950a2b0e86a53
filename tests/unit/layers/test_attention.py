from __future__ import annotations

import pytest
import torch

from dinov2_equi.layers.attention import Attention


def test_attention_differs_from_the_textbook() -> None:
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3)
    x = torch.randn(5, 12)
    q, k, v = attention.qkv(x).chunk(3, dim=1)  # each [T, D]
    heads = [(q[:, s] @ k[:, s].T * 4**-0.5).softmax(dim=1) @ v[:, s] for s in (slice(0, 4), slice(4, 8), slice(8, 12))]
    expected = attention.proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(x, ((1, 5),)), expected, atol=1e-6, rtol=0)  # float32 rounding


def test_one_image_sees_another() -> None:
    attention = Attention(8, num_heads=2)
    x = torch.randn(6, 8)
    layout = ((1, 2), (2, 2))
    before = attention(x, layout)
    x[2:4] += 1.0
    after = attention(x, layout)
    is_same = (before == after).all(dim=1)
    assert is_same.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(("qkv_bias", "proj_bias"), [(False, True), (True, False)])
def test_a_bias_is_there_that_was_switched_off(qkv_bias: bool, proj_bias: bool) -> None:
    attention = Attention(8, num_heads=2, qkv_bias=qkv_bias, proj_bias=proj_bias)
    assert (attention.qkv.bias is not None) == qkv_bias
    assert (attention.proj.bias is not None) == proj_bias


def test_heads_that_do_not_divide_the_width_are_accepted() -> None:
    with pytest.raises(ValueError, match="width 10, num_heads 3"):
        Attention(10, num_heads=3)
