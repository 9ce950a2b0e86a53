"""Names of the architectures and what they stand for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from dinov2_equi.models.vision_transformer import DinoVisionTransformer


@dataclass(frozen=True)
class Arch:
    """Size of a vision transformer: width D, number of blocks, attention heads, feed-forward width over D."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


ARCHS: dict[str, Arch] = {
    "vit_test_tiny": Arch(embed_dim=48, depth=3, num_heads=3),
    "vit_micro": Arch(embed_dim=128, depth=6, num_heads=4),
    "vit_tiny": Arch(embed_dim=192, depth=12, num_heads=3),
    "vit_small": Arch(embed_dim=384, depth=12, num_heads=6),
    "vit_base": Arch(embed_dim=768, depth=12, num_heads=12),
    "vit_large": Arch(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": Arch(embed_dim=1536, depth=40, num_heads=24),
}


def build_backbone(
    arch: str,
    *,
    img_size: int | tuple[int, int],
    patch_size: int,
    block_chunks: int = 0,
    factory: type[DinoVisionTransformer] = DinoVisionTransformer,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Return a newly initialised backbone.

    Args:
        arch: a key of `ARCHS`.
        img_size: size the position embedding is made for, pixels, a number or (H, W).
        patch_size: side of a patch, pixels.
        block_chunks: see `DinoVisionTransformer`; 0, the layout of the released files, unless given.
        factory: class that is built.
        **kwargs: further arguments of `DinoVisionTransformer`.

    Raises:
        ValueError: if the architecture is unknown; names the nearest and all that exist.
    """
    if arch not in ARCHS:
        nearest = difflib.get_close_matches(arch, ARCHS, n=1, cutoff=0.0)
        raise ValueError(f"unknown architecture {arch!r}; did you mean {nearest[0]!r}? Known: {', '.join(ARCHS)}")
    size = ARCHS[arch]
    return factory(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        block_chunks=block_chunks,
        **kwargs,
    )
