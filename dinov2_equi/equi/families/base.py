"""What a transform family is: a parameter vector that can be drawn, scaled towards the identity, and applied.

A family draws one parameter vector theta for each image. The branch knows nothing else about it, and the network is
never told theta. To add a family, write a class in a file of its own and name it in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    num_uniforms: int
    """U, random numbers from which the parameters of an image are made."""

    def from_unit(self, unit: Tensor) -> Tensor:
        """Return parameters [B, P] float32 on the CPU for independent uniform numbers [B, U] in [0, 1)."""

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B, P] float32 parameters on the CPU, uniform in the range of the family."""

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        """Return the parameters of the same shape: the identity at 0, `theta` at 1, linear between."""

    def normalized(self, theta: Tensor) -> Tensor:
        """Return parameters [..., P] as shares of their range: -1 at its lower end, 1 at its upper one."""

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        """Transform images; each result is made from the source itself, whatever the number of results.

        Args:
            images: [B, 3, H, W] in [0, 1].
            theta: [B, P] for one result an image, or [S, B, P] for S of them.

        Returns:
            [B, 3, H, W], or [S, B, 3, H, W], float32 in [0, 1].
        """


@dataclass(frozen=True)
class FamilySettings:
    """Ranges and conventions that the families share. Every parameter is uniform in its range.

    Attributes:
        max_rotation_deg: rotations in [-max, max], degrees.
        max_translation_px: shifts in [-max, max] for x and y, in pixels of a 224-pixel crop; on another size they
            scale with the shorter side.
        max_brightness: brightness is multiplied by 1 + delta, delta in [-max, max].
        max_contrast: the same for contrast.
        max_saturation: the same for saturation.
        max_hue: hue shifts in [-max, max], turns.
        blur_sigma_px: least and greatest standard deviation of the blur, pixels of the crop as it is.
        max_zoom: magnifications in [1 / max, max], uniform on a logarithmic scale.
        max_corner_px: shifts of each corner in [-max, max] for x and y, scaled like `max_translation_px`.
        fill: what lies outside the image, one of `geometry.FILLS`.
        mixture: names of the families that `mixture` draws from.

    Source: Wang et al. (AAAI-26), Table 2, whose second line gives saturation the range of hue; zoom and corners are
    ours; the fill is not stated there.
    """

    max_rotation_deg: float = 45.0
    max_translation_px: float = 10.0
    max_brightness: float = 0.4
    max_contrast: float = 0.4
    max_saturation: float = 0.1
    max_hue: float = 0.1
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    max_zoom: float = 1.25
    max_corner_px: float = 20.0
    fill: str = "reflect"
    mixture: tuple[str, ...] = ("se2", "color", "blur")


class DrawnFromUnit:
    """Draws by `from_unit`, which a subclass has."""

    num_uniforms: int

    def from_unit(self, unit: Tensor) -> Tensor:
        """See `TransformFamily.from_unit`."""
        raise NotImplementedError

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """See `TransformFamily.draw`."""
        return self.from_unit(torch.rand(batch_size, self.num_uniforms, generator=generator))


class RangedFamily(DrawnFromUnit):
    """A family whose parameters are independent and uniform, and zero for the identity."""

    param_names: tuple[str, ...]

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Store the least and the greatest value of each parameter, [P] each."""
        # On the CPU also while networks are built on the meta device: these are numbers, no weights.
        self._low = torch.tensor(low, device="cpu")
        self._span = torch.tensor(high, device="cpu") - self._low
        self.num_uniforms = len(self._low)

    def from_unit(self, unit: Tensor) -> Tensor:
        """See `TransformFamily.from_unit`."""
        return self._low + unit * self._span

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        """See `TransformFamily.scale`."""
        return theta * fraction

    def normalized(self, theta: Tensor) -> Tensor:
        """See `TransformFamily.normalized`; 0 where the range is a point."""
        span = torch.where(self._span > 0, self._span, torch.inf)
        return (2 * (theta.cpu() - self._low) - self._span) / span

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `TransformFamily.apply`."""
        steps = theta if theta.dim() == 3 else theta.unsqueeze(0)  # [S, B, P]
        results = self.apply_steps(images.float(), steps.to(images.device, torch.float32))
        return results if theta.dim() == 3 else results.squeeze(0)

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        """Return [S, B, 3, H, W] for float32 images [B, 3, H, W] and parameters [S, B, P] on their device."""
        raise NotImplementedError


class GeometricFamily(RangedFamily):
    """A family of planar maps: a subclass names its parameters and turns them into maps."""

    def __init__(self, limits: Sequence[float], fill: str) -> None:
        """Store the largest absolute value of each parameter, [P], and the fill."""
        super().__init__([-limit for limit in limits], limits)
        self._fill = fill

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the planar maps [..., 3, 3] of parameters [..., P] for images of `size` (H, W)."""
        raise NotImplementedError

    def apply_steps(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `RangedFamily.apply_steps`; one resampling of each source."""
        return geometry.warp(images, self.maps(theta, (images.shape[-2], images.shape[-1])), self._fill)


def published_pixels(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return lengths given in pixels of a 224-pixel crop as pixels of an image of `size` (H, W)."""
    return values * (min(size) / PUBLISHED_CROP_SIZE)
