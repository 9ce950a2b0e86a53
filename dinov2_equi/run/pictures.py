"""Pictures of a run: reconstructions of held-back images, and patch features as colours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure

from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.evaluation.features import extract_patch_tokens
from dinov2_equi.evaluation.figures import figure_array
from dinov2_equi.evaluation.pictures import pca_colors, pca_figure, reconstruction_figure
from dinov2_equi.logging.metrics import MetricWriter
from dinov2_equi.train.loop import StepHook
from dinov2_equi.train.outputs import Preview
from dinov2_equi.train.preview import make_preview
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

NUM_PICTURES = 5
PCA_PATCHES = 28
"""Side of the patch grid in the PCA pictures: fine enough to see objects."""


def picture_hook(cfg: Config, holdout: ImageDataset | None, device: torch.device) -> StepHook | None:
    """Return what draws reconstructions while training, or None where there is nothing to draw."""
    if holdout is None or cfg.logging.pictures_every_steps == 0 or cfg.equi.loss_weight == 0:
        return None

    def draw(model: SSLMetaArch, step: int, writer: MetricWriter) -> None:
        preview = make_preview(cfg, model, holdout, NUM_PICTURES, device)
        if preview is not None:
            writer.write_image(step, "reconstruction", figure_array(draw_reconstructions(preview)))

    return draw


def draw_reconstructions(preview: Preview) -> Figure:
    """Return the views of a preview beside targets and reconstructions, one image a row."""
    return reconstruction_figure(preview.view_1, preview.view_2, preview.targets, preview.reconstructions)


def draw_features(
    cfg: Config, networks: Mapping[str, torch.nn.Module], holdout: ImageDataset, device: torch.device
) -> Figure:
    """Return held-back photographs above their patch features in each network, by its label."""
    images = eval_images(holdout, PCA_PATCHES * cfg.student.patch_size, NUM_PICTURES)
    colors = {
        label: pca_colors(
            extract_patch_tokens(
                network, images, mean=cfg.data.mean, std=cfg.data.std, device=device, batch_size=NUM_PICTURES
            ),
            (PCA_PATCHES, PCA_PATCHES),
        )
        for label, network in networks.items()
    }
    return pca_figure(images, colors)
