"""DINOv2's multi-crop augmentation, on uint8 and float tensors, with every random number drawn from one generator.

A crop is made in two steps: `CropRecipe.draw` decides everything that is random (a `CropParams`), `make_crop` carries
it out, or `device_augmentation` does for the crops of a whole batch. Cropping and resizing run on the uint8 source, the
colour operations on the small float crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data import crop_pixels
from dinov2_equi.data.color import adjust_brightness, adjust_contrast_, gaussian_blur
from dinov2_equi.data.crop_pixels import Affine, Pixels
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
_BOX_NUMBERS = 2 * _CUT_ATTEMPTS + 2  # uniform numbers: areas, aspects, place
_CHOICE_NUMBERS = 5 + 8 + 1  # uniform numbers: which operations, jitter, blur
_HUE_NUMBER = 3  # in the order of the jitter


@dataclass(frozen=True)
class Crops:
    """The crops of one image, in [0, 1], not normalised."""

    global_crops: Tensor
    """float32 [G, C, H, W]; C is 3 for photographs."""
    local_crops: Tensor
    """float32 [L, C, h, w]; [0, C, h, w] without local crops."""


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
    has_color: bool = True
    """Whether the jitter changes saturation and hue as well."""

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
        flip, jitter, gray, blur, solarize, *strengths, blur_strength = rng.random(_CHOICE_NUMBERS).tolist()
        least_sigma, greatest_sigma = _BLUR_SIGMA_RANGE
        return CropParams(
            box=box,
            is_flipped=flip < self.flip_prob,
            jitter=_color_jitter_of(strengths, has_color=self.has_color) if jitter < self.jitter_prob else None,
            is_gray=gray < self.gray_prob,
            blur_sigma=least_sigma + (greatest_sigma - least_sigma) * blur_strength if blur < self.blur_prob else None,
            is_solarized=solarize < self.solarize_prob,
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
        is_rgb: The images are photographs. If not, their channels have no hue: grey, solarisation and the jitter of
            saturation and hue are left out, that of brightness and contrast changes all channels alike. All other
            random choices stay what they are.

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
        is_rgb: bool = True,
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
                gray_prob=gray_prob if is_rgb else 0.0,
                blur_prob=blur_prob if blur == "intended" else 1.0 - blur_prob,
                solarize_prob=solarize_prob if is_rgb else 0.0,
                has_color=is_rgb,
            )

        crop_pixels.use_one_thread()
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
            image: RGB image, uint8 [3, H, W], or float32 [C, H, W] in [0, 1], which is never rounded to 8 bits.
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
    """Return one crop for each of the choices, float32 [len(choices), C, H, W], all of one size (H, W)."""
    if source.is_floating_point():
        channel_crops = [_make_channel_crop(source, params, size) for params in choices]
        return torch.stack(channel_crops) if channel_crops else source.new_empty(0, len(source), *size)
    crops = torch.empty(len(choices), 3, *size)
    for crop, params in zip(crops, choices, strict=True):
        resized = crop_pixels.cut_and_resize(source, params.box, size)
        if params.is_flipped:
            resized = crop_pixels.flip(resized)
        crop_pixels.write_planes(_color(resized.astype(np.float32), params), crop)
    return crops


def _make_channel_crop(source: Tensor, params: CropParams, size: tuple[int, int]) -> Tensor:
    """Return one crop of an image float32 [C, h, w] in [0, 1] of any channels."""
    top, left, height, width = params.box
    cut = source[None, :, top : top + height, left : left + width]
    crop = F.interpolate(cut, size, mode="bicubic", antialias=True).clamp_(0, 1)  # [1, C, H, W]
    if params.is_flipped:
        crop = crop.flip(3)
    if params.jitter is not None:
        crop = _jitter_channels(crop, params.jitter)
    return crop[0] if params.blur_sigma is None else gaussian_blur(crop[0], params.blur_sigma, BLUR_KERNEL_PX)


def _jitter_channels(crop: Tensor, jitter: ColorJitter) -> Tensor:
    """Return a crop [1, C, H, W] with its brightness and contrast changed."""
    brightness, contrast = torch.tensor(jitter.brightness), torch.tensor(jitter.contrast)
    if jitter.order.index(0) < jitter.order.index(1):
        return adjust_contrast_(adjust_brightness(crop, brightness), contrast)
    return adjust_brightness(adjust_contrast_(crop.clone(), contrast), brightness)


def make_crop(source: Tensor, params: CropParams, size: tuple[int, int]) -> Tensor:
    """Return one crop as float32 [C, H, W] in [0, 1].

    Args:
        source: uint8 [3, H, W], or float32 [C, H, W] in [0, 1].
        params: What to do.
        size: (H, W) of the crop in pixels.
    """
    return _make_crops(source, [params], size)[0]


def _color(pixels: Pixels, params: CropParams) -> Pixels:
    """Return a crop with its colours changed, blurred and solarised."""
    pending: Affine | None = None
    if params.jitter is not None:
        pixels, pending = _jitter(pixels, params.jitter)
    if params.is_gray:
        pending = _after(pending, crop_pixels.saturation(0.0))
    pixels = crop_pixels.change_colors(pixels, pending)
    if params.blur_sigma is not None:
        pixels = crop_pixels.blur(pixels, params.blur_sigma, BLUR_KERNEL_PX)
    if params.is_solarized:
        pixels = crop_pixels.solarize_(pixels, SOLARIZE_THRESHOLD * crop_pixels.FULL)
    return pixels


def _jitter(pixels: Pixels, jitter: ColorJitter) -> tuple[Pixels, Affine | None]:
    """Return a crop with its brightness, contrast, saturation and hue changed, and a change that is still to be made.

    Changes that cannot leave 0..255 are multiplied together; one that can is made and clamped at once.
    """
    pending: Affine | None = None
    for number in jitter.order:
        if number == _HUE_NUMBER:
            pixels, pending = crop_pixels.turn_hue(crop_pixels.change_colors(pixels, pending), jitter.hue), None
            continue
        factor = (jitter.brightness, jitter.contrast, jitter.saturation)[number]
        if number == 0:
            change = crop_pixels.brightness(factor)
        elif number == 1:
            change = crop_pixels.contrast(factor, crop_pixels.mean_luma(pixels, pending))
        else:
            change = crop_pixels.saturation(factor)
        pending = _after(pending, change)
        if factor > 1:
            pixels, pending = crop_pixels.clamp_(crop_pixels.change_colors(pixels, pending)), None
    return pixels, pending


def _after(pending: Affine | None, change: Affine) -> Affine:
    return change if pending is None else change @ pending


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
    return _box_of(source_size, scale, rng.random(_BOX_NUMBERS).tolist())


def _box_of(
    source_size: tuple[int, int], scale: tuple[float, float], uniforms: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return the cut-out that numbers in [0, 1) stand for: areas, aspects, place (y, x)."""
    source_height, source_width = source_size
    least_aspect, aspects = math.log(_ASPECT_RANGE[0]), math.log(_ASPECT_RANGE[1]) - math.log(_ASPECT_RANGE[0])
    for attempt in range(_CUT_ATTEMPTS):
        area = (scale[0] + (scale[1] - scale[0]) * uniforms[attempt]) * (source_height * source_width)
        aspect = math.exp(least_aspect + aspects * uniforms[_CUT_ATTEMPTS + attempt])
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= height <= source_height and 1 <= width <= source_width:
            place_y, place_x = uniforms[-2], uniforms[-1]
            return int(place_y * (source_height - height + 1)), int(place_x * (source_width - width + 1)), height, width
    return _largest_centred_box(source_size)


def _largest_centred_box(source_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the largest centred cut-out with an aspect in 3/4..4/3."""
    height, width = source_size
    if width / height < _ASPECT_RANGE[0]:
        height = max(round(width / _ASPECT_RANGE[0]), 1)
    elif width / height > _ASPECT_RANGE[1]:
        width = max(round(height * _ASPECT_RANGE[1]), 1)
    return (source_size[0] - height) // 2, (source_size[1] - width) // 2, height, width


def _color_jitter_of(uniforms: Sequence[float], *, has_color: bool) -> ColorJitter:
    """Return the jitter that eight numbers in [0, 1) stand for: four strengths, four keys of the order."""
    brightness, contrast, saturation, hue = (2.0 * value - 1.0 for value in uniforms[:4])
    if not has_color:
        saturation = hue = 0.0
    keys = uniforms[4:]
    return ColorJitter(
        brightness=1.0 + _BRIGHTNESS * brightness,
        contrast=1.0 + _CONTRAST * contrast,
        saturation=1.0 + _SATURATION * saturation,
        hue=_HUE * hue,
        # Sorting four uniform values: a uniform order from a fixed number of draws.
        order=tuple(sorted(range(4), key=keys.__getitem__)),
    )


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) from a side or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
