"""Attention of the class token against the network's own, and similar patches against cosine similarity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.evaluation.feature_maps import class_attention, compact_directions
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer


def backbone(registers: int = 0) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = build_backbone("vit_test_tiny", img_size=32, patch_size=8, num_register_tokens=registers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_attention_differs_from_what_the_block_mixes(registers: int) -> None:
    model, x = backbone(registers), torch.randn(2, 3, 32, 48)  # not square
    attention = class_attention(model, x)
    assert attention.shape == (2, 3, 24)
    block = model.block_list()[-1]
    tokens = model.get_intermediate_layers(x, n=[1], norm=False, return_class_token=True)[0]
    before = torch.cat([tokens[1].unsqueeze(1), *registers_of(model, x), tokens[0]], dim=1)  # [B, T, D]
    qkv = block.attn.qkv(block.norm1(before))
    q, k, v = (part.unflatten(-1, (3, 16)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))  # [B, heads, T, 16]
    mixed = F.scaled_dot_product_attention(q, k, v)[:, :, 0]  # of the class token, [B, heads, 16]
    plain = ((q @ k.transpose(2, 3)) / 4).softmax(dim=-1)[:, :, 0]  # [B, heads, T]
    torch.testing.assert_close(attention, plain[..., 1 + registers :], rtol=0, atol=1e-6)
    torch.testing.assert_close((plain[..., None, :] @ v).squeeze(2), mixed, rtol=0, atol=1e-5)


def registers_of(model: DinoVisionTransformer, x: Tensor) -> list[Tensor]:
    """Return the register tokens after the second block, which `get_intermediate_layers` leaves out."""
    if not model.num_register_tokens:
        return []
    (outputs,) = model._outputs_of_blocks(x, [1])
    return [outputs[:, 1 : 1 + model.num_register_tokens]]


def test_hook_or_training_mode_stays_behind() -> None:
    model = backbone().train()
    class_attention(model, torch.randn(1, 3, 32, 32))
    assert model.training
    assert not model.block_list()[-1].attn.qkv._forward_hooks


def test_scalar_products_are_no_cosine_similarities() -> None:
    tokens = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) + 5
    compact = compact_directions(tokens, dim=20)
    assert compact.dtype == torch.int8
    centred = tokens - tokens.mean(dim=0)
    expected = F.cosine_similarity(centred[:, None], centred[None], dim=-1)
    found = (compact.double() @ compact.double().T) / 127**2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)  # eight bits


def test_fewer_components_than_asked_for_are_an_error() -> None:
    assert compact_directions(torch.randn(9, 4)).shape == (9, 4)
    assert compact_directions(torch.randn(9, 100)).shape[1] == 9
