"""Normalisation, and the fixed transform of evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data.datasets.base import ImageDataset, image_to_tensor
from dinov2_equi.data.datasets.blocks import spread_images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESIZE_PER_CROP = 256 / 224  # the customary margin around the centre crop


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Return (images - mean) / std per channel.

    Args:
        images: floating point [..., C, H, W] in [0, 1].
        mean: One value a channel.
        std: One value a channel.

    Raises:
        ValueError: Another number of channels; names both.
    """
    if images.shape[-3] != len(mean):
        raise ValueError(
            f"the network reads images of {len(mean)} channels, these have {images.shape[-3]}: data.in_channels of its "
            "run says which it was trained on"
        )
    shape = (-1, 1, 1)
    mean_tensor = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    std_tensor = torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
    return (images - mean_tensor) / std_tensor


class EvalTransform:
    """Resizes the shorter side (bicubic) and cuts out the centre; nothing is random.

    Args:
        size: Side of the result, or (H, W), in pixels.
        resize: Shorter side before the centre is cut out, in pixels; None: 256/224 of the larger side of `size`.

    Raises:
        ValueError: A size below 1, or `resize` smaller than the result.
    """

    def __init__(self, size: int | Sequence[int], resize: int | None = None) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        self.size = (height, width)
        self.resize = round(max(self.size) * _RESIZE_PER_CROP) if resize is None else resize
        if min(self.size) < 1 or self.resize < max(self.size):
            raise ValueError(f"needs sides >= 1 and resize >= the larger one; got {self.size}, resize {self.resize}")

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return an image as float32 [C, H, W] in [0, 1], not normalised.

        Args:
            image: RGB image, uint8 [3, H, W], or float32 [C, H, W] in [0, 1].
        """
        source = image if isinstance(image, Tensor) else image_to_tensor(image)
        resized = tvf.resize(source, [self.resize], InterpolationMode.BICUBIC, antialias=True)
        crop: Tensor = tvf.center_crop(resized, list(self.size))
        if crop.is_floating_point():
            return crop.contiguous().clamp_(0, 1)
        return crop.contiguous().to(torch.float32).div_(255.0)


def load_images(dataset: ImageDataset, indices: Iterable[int], transform: EvalTransform) -> Tensor:
    """Return the images of a data set with these numbers as float32 [n, 3, H, W] in [0, 1], n >= 1.

    Raises:
        UnreadableImageError: An image cannot be decoded; names the file.
    """
    return torch.stack([transform(dataset.load_tensor(index, transform.resize)) for index in indices])


def eval_images(dataset: ImageDataset, size: int, count: int) -> Tensor:
    """Return up to `count` images, evenly spread over a data set, resized and cropped: [n, 3, size, size] in [0, 1]."""
    return load_images(dataset, spread_images(dataset, count), EvalTransform(size))
