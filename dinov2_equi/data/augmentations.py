"""DINOv2's multi-crop augmentation, on uint8 and float tensors, with every random number drawn from one generator.

A crop is made in two steps: `CropRecipe.draw` decides everything that is random (a `CropParams`), `make_crop` carries
it out, or `device_augmentation` does for the crops of a whole batch. Cropping and resizing run on the uint8 source, the
colour operations on the small float crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data.color import adjust_hue, gaussian_blur
from dinov2_equi.data.datasets.base import image_to_tensor

BLUR_CHOICES = ("intended", "dinov2_released")

BLUR_KERNEL_PX = 9
"""Side of the Gaussian kernel, as in DINOv2."""

SOLARIZE_THRESHOLD = 128 / 255
"""Values from here on are inverted by solarisation."""

_BLUR_SIGMA_RANGE = (0.1, 2.0)  # pixels
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of the cut-out
_CUT_ATTEMPTS = 10


@dataclass(frozen=True)
class Crops:
    """The crops of one image, in [0, 1], not normalised."""

    global_crops: Tensor
    """float32 [G, 3, H, W]."""
    local_crops: Tensor
    """float32 [L, 3, h, w]; [0, 3, h, w] without local crops."""


@dataclass(frozen=True)
class ColorJitter:
    """Colour changes of one crop: factors around 1, the hue shift in turns, and the order they are applied in."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]
    """Permutation of (0 brightness, 1 contrast, 2 saturation, 3 hue)."""


@dataclass(frozen=True)
class CropParams:
    """Everything that is random about one crop."""

    box: tuple[int, int, int, int]
    """Cut-out in the source: top, left, height, width, in pixels."""
    is_flipped: bool
    jitter: ColorJitter | None
    is_gray: bool
    blur_sigma: float | None
    """Standard deviation of the Gaussian blur in pixels of the crop; None: not blurred."""
    is_solarized: bool


@dataclass(frozen=True)
class Choices:
    """Everything that is random about the crops of one image."""

    global_crops: list[CropParams]
    local_crops: list[CropParams]


@dataclass(frozen=True)
class CropRecipe:
    """How one kind of crop is drawn: its size in pixels, share of the image's area, and probabilities."""

    size: tuple[int, int]
    scale: tuple[float, float]
    flip_prob: float
    jitter_prob: float
    gray_prob: float
    blur_prob: float
    solarize_prob: float

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: A size below 1, a scale not within 0 < min <= max <= 1, or a probability outside [0, 1].
        """
        if min(self.size) < 1:
            raise ValueError(f"a crop must be at least 1 x 1 pixels; got {self.size}")
        low, high = self.scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"a crop scale must satisfy 0 < min <= max <= 1; got ({low}, {high})")
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")

    @property
    def min_source_side(self) -> int:
        """Shorter side, in pixels, from which a source loses nothing: its smallest cut-out is as large as the crop."""
        narrowest = math.sqrt(self.scale[0] * _ASPECT_RANGE[0])  # of a square source's side
        return math.ceil(max(self.size) / narrowest)

    def draw(self, source_size: tuple[int, int], rng: np.random.Generator) -> CropParams:
        """Return the random choices for one crop of a source of (H, W) pixels.

        The number of values taken from `rng` depends on nothing, so that a changed probability or size leaves every
        other choice as it was.
        """
        box = draw_box(source_size, self.scale, rng)
        flip, jitter, gray, blur, solarize = rng.random(5) < (
            self.flip_prob,
            self.jitter_prob,
            self.gray_prob,
            self.blur_prob,
            self.solarize_prob,
        )
        color_jitter = _draw_color_jitter(rng)
        blur_sigma = rng.uniform(*_BLUR_SIGMA_RANGE)
        return CropParams(
            box=box,
            is_flipped=bool(flip),
            jitter=color_jitter if jitter else None,
            is_gray=bool(gray),
            blur_sigma=blur_sigma if blur else None,
            is_solarized=bool(solarize),
        )


class DataAugmentationDINO:
    """Two global and `local_crops_number` local crops of an image, as in DINOv2.

    Each crop: a cut-out of random area and aspect, resized bicubically; flip; colour jitter in random order; grey;
    blur; and for the second global crop solarisation.

    Args:
        global_crops_scale: Least and greatest share of the image's area in a global crop.
        local_crops_scale: The same for a local crop.
        local_crops_number: Local crops of one image, L >= 0.
        global_crops_size: Side of a global crop, or (H, W), in pixels.
        local_crops_size: Side of a local crop, or (H, W), in pixels.
        blur: "intended": a crop is blurred with the stated probability. "dinov2_released": with one minus that
            probability, which is how DINOv2's published weights were trained.
        flip_prob: Probability of a left-right flip, every crop.
        jitter_prob: Probability of colour jitter, every crop.
        gray_prob: Probability of grey, every crop.
        global_blur_probs: Probability of blur for the first and the second global crop.
        local_blur_prob: Probability of blur for a local crop.
        solarize_prob: Probability of solarisation, second global crop only.

    Raises:
        ValueError: A value out of its range, or an unknown `blur`.

    Source: DINOv2, section 4 and appendix; its `DataAugmentationDINO`.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int | Sequence[int] = 224,
        local_crops_size: int | Sequence[int] = 96,
        *,
        blur: str = "intended",
        flip_prob: float = 0.5,
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        global_blur_probs: tuple[float, float] = (1.0, 0.1),
        local_blur_prob: float = 0.5,
        solarize_prob: float = 0.2,
    ) -> None:
        if blur not in BLUR_CHOICES:
            raise ValueError(f"blur must be one of {', '.join(BLUR_CHOICES)}; got {blur!r}")
        if local_crops_number < 0:
            raise ValueError(f"local_crops_number must be >= 0; got {local_crops_number}")

        def recipe(
            size: int | Sequence[int], scale: Sequence[float], blur_prob: float, solarize_prob: float
        ) -> CropRecipe:
            return CropRecipe(
                size=_as_pair(size),
                scale=(scale[0], scale[1]),
                flip_prob=flip_prob,
                jitter_prob=jitter_prob,
                gray_prob=gray_prob,
                blur_prob=blur_prob if blur == "intended" else 1.0 - blur_prob,
                solarize_prob=solarize_prob,
            )

        self.global_recipes = (
            recipe(global_crops_size, global_crops_scale, global_blur_probs[0], 0.0),
            recipe(global_crops_size, global_crops_scale, global_blur_probs[1], solarize_prob),
        )
        local_recipe = recipe(local_crops_size, local_crops_scale, local_blur_prob, 0.0)
        self.local_recipes = (local_recipe,) * local_crops_number
        self.global_crops_size = self.global_recipes[0].size
        self.local_crops_size = local_recipe.size

    @property
    def min_source_side(self) -> int:
        """Shorter side, in pixels, beyond which a larger source image adds no detail to any crop."""
        return max(recipe.min_source_side for recipe in self.global_recipes + self.local_recipes)

    def draw(self, source_size: tuple[int, int], rng: np.random.Generator) -> Choices:
        """Return the random choices for the crops of an image of (H, W) pixels; `rng` is advanced."""
        return Choices(
            global_crops=[recipe.draw(source_size, rng) for recipe in self.global_recipes],
            local_crops=[recipe.draw(source_size, rng) for recipe in self.local_recipes],
        )

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator) -> Crops:
        """Return the crops of an image.

        Args:
            image: RGB image, or uint8 [3, H, W].
            rng: The only source of randomness; advanced.
        """
        source = image if isinstance(image, Tensor) else image_to_tensor(image)
        height, width = source.shape[-2:]
        choices = self.draw((height, width), rng)
        return Crops(
            global_crops=_make_crops(source, choices.global_crops, self.global_crops_size),
            local_crops=_make_crops(source, choices.local_crops, self.local_crops_size),
        )


def _make_crops(source: Tensor, choices: Sequence[CropParams], size: tuple[int, int]) -> Tensor:
    """Return one crop for each of the choices, float32 [len(choices), 3, H, W], all of one size (H, W)."""
    crops = torch.empty(len(choices), 3, *size)
    for crop, params in zip(crops, choices, strict=True):
        crop.copy_(make_crop(source, params, size))
    return crops


def make_crop(source: Tensor, params: CropParams, size: tuple[int, int]) -> Tensor:
    """Return one crop as float32 [3, H, W] in [0, 1].

    Args:
        source: uint8 [3, H, W].
        params: What to do.
        size: (H, W) of the crop in pixels.
    """
    top, left, height, width = params.box
    crop: Tensor = tvf.resized_crop(
        source, top, left, height, width, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    if params.is_flipped:
        crop = tvf.horizontal_flip(crop)
    crop = crop.contiguous().to(torch.float32).div_(255.0)
    if params.jitter is not None:
        crop = apply_color_jitter(crop, params.jitter)
    if params.is_gray:
        crop = tvf.rgb_to_grayscale(crop, num_output_channels=3)
    if params.blur_sigma is not None:
        crop = gaussian_blur(crop, params.blur_sigma, BLUR_KERNEL_PX)
    if params.is_solarized:
        crop = tvf.solarize(crop, SOLARIZE_THRESHOLD)
    return crop.contiguous()


def apply_color_jitter(crop: Tensor, jitter: ColorJitter) -> Tensor:
    """Return a crop, float32 [3, H, W] in [0, 1], with its brightness, contrast, saturation and hue changed."""
    operations: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda image: tvf.adjust_brightness(image, jitter.brightness),
        lambda image: tvf.adjust_contrast(image, jitter.contrast),
        lambda image: tvf.adjust_saturation(image, jitter.saturation),
        lambda image: adjust_hue(image, jitter.hue),
    )
    for number in jitter.order:
        crop = operations[number](crop)
    return crop


def draw_box(
    source_size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random cut-out.

    Ten times an area (uniform within `scale` of the source's) and an aspect (log-uniform in 3/4..4/3) are drawn; the
    first that fits is used, at a uniform place. Where none fits: the largest centred cut-out of the nearest allowed
    aspect. Same law as torchvision's RandomResizedCrop.

    Args:
        source_size: (H, W) in pixels.
        scale: Least and greatest share of the area.
        rng: Advanced by the same number of values whatever the outcome.
    """
    source_height, source_width = source_size
    areas = rng.uniform(*scale, _CUT_ATTEMPTS) * (source_height * source_width)
    aspects = np.exp(rng.uniform(math.log(_ASPECT_RANGE[0]), math.log(_ASPECT_RANGE[1]), _CUT_ATTEMPTS))
    place_y, place_x = rng.random(2)
    heights = np.rint(np.sqrt(areas / aspects)).astype(int)
    widths = np.rint(np.sqrt(areas * aspects)).astype(int)
    fits = (heights >= 1) & (heights <= source_height) & (widths >= 1) & (widths <= source_width)
    if not fits.any():
        return _largest_centred_box(source_size)
    first = int(np.argmax(fits))
    height, width = int(heights[first]), int(widths[first])
    return int(place_y * (source_height - height + 1)), int(place_x * (source_width - width + 1)), height, width


def _largest_centred_box(source_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the largest centred cut-out with an aspect in 3/4..4/3."""
    height, width = source_size
    if width / height < _ASPECT_RANGE[0]:
        height = max(round(width / _ASPECT_RANGE[0]), 1)
    elif width / height > _ASPECT_RANGE[1]:
        width = max(round(height * _ASPECT_RANGE[1]), 1)
    return (source_size[0] - height) // 2, (source_size[1] - width) // 2, height, width


def _draw_color_jitter(rng: np.random.Generator) -> ColorJitter:
    brightness, contrast, saturation, hue = rng.uniform(-1.0, 1.0, 4)
    return ColorJitter(
        brightness=1.0 + _BRIGHTNESS * brightness,
        contrast=1.0 + _CONTRAST * contrast,
        saturation=1.0 + _SATURATION * saturation,
        hue=_HUE * hue,
        # Sorting four uniform values: a uniform order from a fixed number of draws.
        order=tuple(int(number) for number in np.argsort(rng.random(4))),
    )


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) from a side or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
