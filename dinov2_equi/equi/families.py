"""Transform families: what may happen to the second view. To add one, write a class here and register it.

A family draws one parameter vector theta for each image, scales it towards the identity, and applies it. The branch
knows nothing else about a family, and the network is never told theta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dinov2_equi.equi import geometry

PUBLISHED_CROP_SIZE = 224
"""The paper gives its translation range without a unit; we read it as pixels of a crop of this size."""


class TransformFamily(Protocol):
    """An image change whose parameter vector can be scaled towards the identity."""

    param_names: tuple[str, ...]
    """One name with its unit for each of the P parameters."""

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B, P] float32 parameters on the CPU, uniform in the range of the family."""

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        """Return the parameters of the same shape: the identity at 0, `theta` at 1, linear between."""

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        """Transform images; one resampling of each source whatever the number of results.

        Args:
            images: [B, 3, H, W] in [0, 1].
            theta: [B, P] for one result an image, or [S, B, P] for S of them.

        Returns:
            [B, 3, H, W], or [S, B, 3, H, W], float32 in [0, 1].
        """


@dataclass(frozen=True)
class FamilySettings:
    """Ranges and conventions that the families share.

    Attributes:
        max_rotation_deg: rotations are uniform in [-max, max], degrees.
        max_translation_px: shifts are uniform in [-max, max] for x and y, in pixels of a 224-pixel crop; on another
            size they scale with the shorter side.
        fill: what lies outside the image, one of `geometry.FILLS`.

    Source: Wang et al. (AAAI-26), Table 2; the fill is not stated there.
    """

    max_rotation_deg: float = 45.0
    max_translation_px: float = 10.0
    fill: str = "reflect"


class GeometricFamily:
    """A family of planar maps: a subclass names its parameters and turns them into maps."""

    param_names: tuple[str, ...]

    def __init__(self, limits: tuple[float, ...], fill: str) -> None:
        """Store the largest absolute value of each parameter, [P], and the fill."""
        self._limits = torch.tensor(limits)  # [P]
        self._fill = fill

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the planar maps [..., 3, 3] of parameters [..., P] for images of `size` (H, W)."""
        raise NotImplementedError

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """See `TransformFamily.draw`."""
        unit = torch.rand(batch_size, len(self.param_names), generator=generator)  # [B, P] in [0, 1)
        return (2 * unit - 1) * self._limits

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        """See `TransformFamily.scale`."""
        return theta * fraction

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `TransformFamily.apply`."""
        steps = theta if theta.dim() == 3 else theta.unsqueeze(0)  # [S, B, P]
        maps = self.maps(steps.to(images.device, torch.float32), (images.shape[-2], images.shape[-1]))
        warped = geometry.warp(images, maps, self._fill)  # [S, B, 3, H, W]
        return warped if theta.dim() == 3 else warped.squeeze(0)


class Rotation(GeometricFamily):
    """Rotation about the crop centre."""

    param_names: tuple[str, ...] = ("rotation_deg",)

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range and the fill from `settings`."""
        super().__init__((settings.max_rotation_deg,), settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        return geometry.rotation(theta[..., 0])


class SE2(GeometricFamily):
    """Rotation about the crop centre, then translation; the three parameters scale linearly, not the motion."""

    param_names: tuple[str, ...] = ("rotation_deg", "translation_x_px", "translation_y_px")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the ranges and the fill from `settings`."""
        limits = (settings.max_rotation_deg, settings.max_translation_px, settings.max_translation_px)
        super().__init__(limits, settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        pixels = theta[..., 1:] * (min(size) / PUBLISHED_CROP_SIZE)
        return geometry.compose(geometry.translation(pixels), geometry.rotation(theta[..., 0]))


FAMILIES: dict[str, Callable[[FamilySettings], TransformFamily]] = {
    "rotation": Rotation,
    "se2": SE2,
}


def build_family(name: str, settings: FamilySettings | None = None) -> TransformFamily:
    """Return the family called `name` with the given (default: published) ranges.

    Raises:
        ValueError: if the name is unknown; lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown transform family {name!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name](settings or FamilySettings())
