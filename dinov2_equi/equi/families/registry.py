"""The transform families by name."""

from __future__ import annotations

from collections.abc import Callable

from dinov2_equi.equi.families.base import FamilySettings, TransformFamily
from dinov2_equi.equi.families.geometric import SE2, Perspective, Rotation, Similarity, Translation, Zoom
from dinov2_equi.equi.families.mixture import Mixture
from dinov2_equi.equi.families.photometric import Blur, Color


def _mixture(settings: FamilySettings) -> Mixture:
    return Mixture({name: build_family(name, settings) for name in settings.mixture})


MIXTURE = "mixture"
NEED_COLOR = ("color",)
"""Families of which grey images show nothing."""

FAMILIES: dict[str, Callable[[FamilySettings], TransformFamily]] = {
    "rotation": Rotation,
    "translation": Translation,
    "se2": SE2,
    "color": Color,
    "blur": Blur,
    "scale": Zoom,
    "similarity": Similarity,
    "perspective": Perspective,
    MIXTURE: _mixture,
}


def build_family(name: str, settings: FamilySettings | None = None) -> TransformFamily:
    """Return the family called `name` with the given (default: published) ranges.

    Raises:
        ValueError: if the name is unknown; lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown transform family {name!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name](settings or FamilySettings())
