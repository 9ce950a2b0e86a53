"""The probe of a training run: can the rotation be read from the features, before and after training?"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.small_photos import SmallPhotos
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.equi.families.registry import build_family
from dinov2_equi.evaluation.transform_regression import ProbeResult, transform_regression
from dinov2_equi.train.build_model import family_settings

logger = logging.getLogger(__name__)

PROBE_FAMILY = "rotation"
PROBE_FEATURES = "class token + mean patch token"
MIN_DRAWS_PER_IMAGE = 4
"""Least number of transforms drawn for a probe image; one each would measure how the probe overfits few pairs."""


@dataclass(frozen=True)
class ProbePair:
    """The same probe on the weights before training and on the trained teacher.

    Attributes:
        before: None where the weights that the run started from are gone.
        after: the trained teacher.
        images: what the probe was trained and tested on, in words.
    """

    before: ProbeResult | None
    after: ProbeResult
    images: str


def run_probe(
    cfg: Config,
    *,
    before: torch.nn.Module | None,
    after: torch.nn.Module,
    train_set: ImageDataset,
    test_set: ImageDataset,
    device: torch.device,
) -> ProbePair:
    """Regress the rotation from frozen features of image pairs; the test images are not among the training ones.

    Both backbones are given the same pairs.
    """
    settings = cfg.evaluation
    size = settings.probe_size or cfg.crops.global_crops_size
    train_images = eval_images(train_set, size, max(1, settings.probe_train_pairs // MIN_DRAWS_PER_IMAGE))
    test_images = eval_images(test_set, size, max(1, settings.probe_test_pairs // MIN_DRAWS_PER_IMAGE))
    images = f"{len(train_images)} images to train on, {len(test_images)} to test on, from {_kind(train_set)}"
    logger.info("probing the features for the rotation: %d pairs; %s", settings.probe_train_pairs, images)
    family = build_family(PROBE_FAMILY, family_settings(cfg))

    def probe(backbone: torch.nn.Module) -> ProbeResult:
        return transform_regression(
            backbone,
            family,
            train_images,
            test_images,
            num_train_pairs=settings.probe_train_pairs,
            num_test_pairs=settings.probe_test_pairs,
            mean=cfg.data.mean,
            std=cfg.data.std,
            device=device,
            batch_size=settings.batch_size,
            epochs=settings.probe_epochs,
            seed=cfg.train.seed,
        )

    return ProbePair(before=None if before is None else probe(before), after=probe(after), images=images)


def _kind(dataset: ImageDataset) -> str:
    if isinstance(dataset, SmallPhotos):
        return "scikit-image's small grey photographs (25 x 25 pixels, faces and backgrounds)"
    return "the training and the held-back images"
