"""Reconstructions of held-back images, for people to look at."""

from __future__ import annotations

from dataclasses import fields

import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.train import build
from dinov2_equi.train.outputs import Preview
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch


@torch.no_grad()
def make_preview(
    cfg: Config, model: SSLMetaArch, images: ImageDataset, count: int, device: torch.device
) -> Preview | None:
    """Return reconstructions from unmasked views of `count` images, always the same; None where none is drawn."""
    if model.equi is None or not isinstance(model.equi.objective, Reconstruction):
        return None
    batch = build.build_preview_batch(cfg, images, count).to(device)
    was_training = model.training
    model.eval()
    result = model.reconstruct(batch)
    model.train(was_training)
    return Preview(*(getattr(result, field.name).float().cpu() for field in fields(result)))
