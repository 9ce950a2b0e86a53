"""Classes that are known by a whole number for each image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

NO_CLASS = -1
"""Label of an image without a class."""


class NumberedClasses:
    """Which classes there are among labels, each called by its number, in the order of the numbers.

    Where one image has no class, none has.

    Args:
        labels: whole numbers [n], `NO_CLASS` or another one below 0 for an image without a class; may be memory-mapped.
    """

    def __init__(self, labels: npt.NDArray[Any]) -> None:
        known = np.unique(labels)
        self._labels = labels
        self._known = known if len(known) and known[0] >= 0 else known[:0]

    @property
    def targets(self) -> list[int] | None:
        """Place of the class of each image among `classes`; None without classes."""
        if not len(self._known):
            return None
        targets: list[int] = np.searchsorted(self._known, self._labels).tolist()
        return targets

    @property
    def classes(self) -> list[str]:
        """The numbers as text; empty without classes."""
        return [str(label) for label in self._known]
