"""Families of planar maps, from a rotation to a change of perspective."""

from __future__ import annotations

import math

from torch import Tensor

from dinov2_equi.equi import geometry
from dinov2_equi.equi.families.base import FamilySettings, GeometricFamily, published_pixels


class Rotation(GeometricFamily):
    """Rotation about the crop centre."""

    param_names: tuple[str, ...] = ("rotation_deg",)

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range and the fill from `settings`."""
        super().__init__((settings.max_rotation_deg,), settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        return geometry.rotation(theta[..., 0])


class Translation(GeometricFamily):
    """Shift along both axes."""

    param_names: tuple[str, ...] = ("translation_x_px", "translation_y_px")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range and the fill from `settings`."""
        super().__init__((settings.max_translation_px,) * 2, settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        return geometry.translation(published_pixels(theta, size))


class SE2(GeometricFamily):
    """Rotation about the crop centre, then translation; the three parameters scale linearly, not the motion."""

    param_names: tuple[str, ...] = ("rotation_deg", "translation_x_px", "translation_y_px")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the ranges and the fill from `settings`."""
        limits = (settings.max_rotation_deg, settings.max_translation_px, settings.max_translation_px)
        super().__init__(limits, settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        shift = geometry.translation(published_pixels(theta[..., 1:], size))
        return geometry.compose(shift, geometry.rotation(theta[..., 0]))


class Zoom(GeometricFamily):
    """Isotropic scale about the crop centre.

    The parameter is the logarithm of the magnification, so that minus theta undoes theta, and a third of theta,
    applied three times, is theta.
    """

    param_names: tuple[str, ...] = ("log_zoom",)

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range and the fill from `settings`."""
        super().__init__((math.log(settings.max_zoom),), settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        return geometry.scaling(theta[..., 0].exp())


class Similarity(GeometricFamily):
    """Isotropic scale and rotation about the crop centre, then translation."""

    param_names: tuple[str, ...] = ("rotation_deg", "log_zoom", "translation_x_px", "translation_y_px")

    def __init__(self, settings: FamilySettings) -> None:
        """Take the ranges and the fill from `settings`."""
        shift = settings.max_translation_px
        super().__init__((settings.max_rotation_deg, math.log(settings.max_zoom), shift, shift), settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        turn = geometry.compose(geometry.rotation(theta[..., 0]), geometry.scaling(theta[..., 1].exp()))
        return geometry.compose(geometry.translation(published_pixels(theta[..., 2:], size)), turn)


class Perspective(GeometricFamily):
    """Change of perspective: each corner of the image moves on its own.

    The path between the identity and theta moves the corners along straight lines; the homographies between have no
    other parameter that is linear.
    """

    param_names: tuple[str, ...] = tuple(
        f"{corner}_{axis}_px"
        for corner in ("top_left", "top_right", "bottom_right", "bottom_left")
        for axis in ("x", "y")
    )

    def __init__(self, settings: FamilySettings) -> None:
        """Take the range and the fill from `settings`."""
        super().__init__((settings.max_corner_px,) * len(self.param_names), settings.fill)

    def maps(self, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """See `GeometricFamily.maps`."""
        offsets = published_pixels(theta, size).unflatten(-1, (4, 2))  # [..., 4, 2]
        return geometry.homography(geometry.corners(size, device=theta.device) + offsets, size)
