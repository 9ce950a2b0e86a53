"""Reconstructions of held-back images, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.train import build
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch


@dataclass(frozen=True)
class Preview:
    """Images in [0, 1] on the CPU.

    Attributes:
        view_1: [B, 3, H, W].
        view_2: [B, 3, H, W].
        targets: [S, B, 3, H, W].
        reconstructions: [S, B, 3, H, W].
    """

    view_1: Tensor
    view_2: Tensor
    targets: Tensor
    reconstructions: Tensor


@torch.no_grad()
def make_preview(
    cfg: Config, model: SSLMetaArch, images: ImageDataset, count: int, device: torch.device
) -> Preview | None:
    """Return reconstructions from unmasked views of `count` images, always the same; None without a decoder."""
    if model.equi is None or model.equi.decoder is None:
        return None
    batch = build.build_preview_batch(cfg, images, count).to(device)
    was_training = model.training
    model.eval()
    result = model.reconstruct(batch)
    model.train(was_training)
    return Preview(*(tensor.float().cpu() for tensor in result))
