from __future__ import annotations

import pytest
import torch

from dinov2_equi.models.registry import ARCHS, build_backbone


@pytest.mark.parametrize(
    ("name", "embed_dim", "depth", "num_heads"),
    [
        ("vit_test_tiny", 48, 3, 3),
        ("vit_micro", 128, 6, 4),
        ("vit_tiny", 192, 12, 3),
        ("vit_small", 384, 12, 6),
        ("vit_base", 768, 12, 12),
        ("vit_large", 1024, 24, 16),
        ("vit_giant2", 1536, 40, 24),
    ],
)
def test_an_architecture_has_another_size(name: str, embed_dim: int, depth: int, num_heads: int) -> None:
    with torch.device("meta"):
        model = build_backbone(name, img_size=224, patch_size=16)
    assert (model.embed_dim, model.n_blocks, model.num_heads) == (embed_dim, depth, num_heads)
    assert model.embed_dim % model.num_heads == 0


def test_every_architecture_is_tested() -> None:
    assert len(ARCHS) == 7


def test_arguments_do_not_reach_the_model() -> None:
    model = build_backbone("vit_test_tiny", img_size=(28, 42), patch_size=14, num_register_tokens=2, block_chunks=3)
    assert model.num_register_tokens == 2
    assert model.pos_embed.shape == (1, 7, 48)
    assert "blocks.2.2.norm1.weight" in model.state_dict()


def test_a_misspelt_architecture_gets_no_help() -> None:
    with pytest.raises(ValueError, match=r"'vit_smal'; did you mean 'vit_small'\? Known: vit_test_tiny, .*vit_giant2"):
        build_backbone("vit_smal", img_size=224, patch_size=16)
