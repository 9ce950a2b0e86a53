"""Maps over the patches of an image: where the class token looks, and which patches are alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.features import eval_mode
from dinov2_equi.models.vision_transformer import DinoVisionTransformer

COMPACT_DIM = 48
"""Components kept of a patch token where many of them travel in a page."""


def class_attention(backbone: DinoVisionTransformer, x: Tensor) -> Tensor:
    """Return how much the class token attends to each patch in the last block: [B, heads, N], rows sum to 1 or less.

    What is missing to 1 goes to the class token itself and to registers.

    Args:
        backbone: its weights live on the device of `x`.
        x: normalised images [B, 3, H, W].

    Source: Caron et al. 2021 (DINO, arXiv 2104.14294), figure 1.
    """
    attention = backbone.block_list()[-1].attn
    captured: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        captured.append(output)

    handle = attention.qkv.register_forward_hook(keep)
    try:
        with eval_mode(backbone):
            backbone.forward_features(x)
    finally:
        handle.remove()
    (qkv,) = captured  # [B * T, 3 * D]
    qkv = qkv.float().reshape(len(x), -1, 3, attention.num_heads, backbone.embed_dim // attention.num_heads)
    query, key, _ = qkv.unbind(2)  # [B, T, heads, head_dim]
    scores = torch.einsum("bhd,bthd->bht", query[:, 0], key) * key.shape[-1] ** -0.5
    weights: Tensor = scores.softmax(dim=-1)  # [B, heads, T]
    return weights[..., 1 + backbone.num_register_tokens :]


def compact_directions(patch_tokens: Tensor, dim: int = COMPACT_DIM) -> Tensor:
    """Return patch tokens [N, D] as int8 [N, d], d <= dim: scalar products are cosine similarities times 127 squared.

    The tokens are centred over the image, which takes off what all patches share; the strongest components are kept.
    """
    tokens = patch_tokens.double() - patch_tokens.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(tokens, full_matrices=False)  # [min(N, D), D]
    components = F.normalize(tokens @ directions[:dim].T, dim=1)
    return (components * 127).round().to(torch.int8)
