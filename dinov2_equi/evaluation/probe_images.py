"""Images that probes are trained and tested on, held in memory: every seed and family uses them again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.channels import RGB_CHANNELS
from dinov2_equi.data.datasets.holdout import evenly_spread
from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.evaluation.labelled import image_batches, matching_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeImages:
    """Images to train and to test probes on, disjoint, all of one size.

    Attributes:
        train: [n, C, H, W] uint8, or float32 in [0, 1].
        test: [m, C, H, W], other images.
        labels: class numbers of both, [n] and [m] int64; None where the images have no classes.
    """

    train: Tensor
    test: Tensor
    labels: tuple[Tensor, Tensor] | None = None

    @property
    def is_grey(self) -> bool:
        """Whether no training image has any colour, which only photographs have."""
        return self.train.shape[1] != RGB_CHANNELS or bool((self.train == self.train[:, :1]).all())


def load_probe_images(
    train: ImageDataset,
    test: ImageDataset,
    *,
    size: int,
    max_train: int,
    max_test: int,
    batch_size: int = 64,
    num_workers: int = 0,
) -> ProbeImages:
    """Return images as uint8 [n, 3, size, size], resized and cropped, with labels where both sets have classes.

    Those that are read channel by channel stay float32 [n, C, size, size] in [0, 1].

    Args:
        train, test: disjoint data sets.
        size: side, pixels.
        max_train, max_test: take that many at most, evenly spread over the set.
        batch_size: images that a worker decodes at a time.
        num_workers: processes that decode images.

    Raises:
        DatasetError: an image cannot be decoded; names the file.
    """
    few_train, few_test = evenly_spread(train, max_train), evenly_spread(test, max_test)
    transform = EvalTransform(size)

    def load(images: ImageDataset) -> Tensor:
        batches = image_batches(images, transform, batch_size=batch_size, num_workers=num_workers)
        if images.load_tensor(0).is_floating_point():
            return torch.cat(list(batches))
        # The transform divides whole numbers by 255: nothing is lost on the way back.
        return torch.cat([(batch * 255).round().to(torch.uint8) for batch in batches])

    return ProbeImages(load(few_train), load(few_test), _labels(few_train, few_test))


def as_float(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1], whether they are so already or uint8 in 0..255."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _labels(train: ImageDataset, test: ImageDataset) -> tuple[Tensor, Tensor] | None:
    if train.targets is None or test.targets is None:
        return None
    try:
        return matching_labels(train, test)
    except DatasetError as error:
        logger.warning("no k-NN: %s", error)
        return None
