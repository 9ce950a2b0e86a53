"""Masks made of rectangular blocks of patches, for iBOT."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_BLOCK_ATTEMPTS = 10


class MaskingGenerator:
    """Masks of about a wanted number of patches, as a union of random rectangles.

    Rectangles are added until the number is reached or ten attempts in a row fit nowhere, so that a mask may hold
    fewer patches than wanted, never more.

    Args:
        grid: (h, w), patches down and across.
        max_num_patches: Most patches that one rectangle may add; None: half the grid.
        min_num_patches: Least area of a rectangle, in patches, before rounding.
        min_aspect: Least ratio of a rectangle's sides; the greatest is its inverse.

    Raises:
        ValueError: An empty grid, or a bound out of its range.

    Source: BEiT, algorithm 1 (blockwise masking), with DINOv2's constants.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        max_num_patches: float | None = None,
        min_num_patches: int = 4,
        min_aspect: float = 0.3,
    ) -> None:
        if min(grid) < 1:
            raise ValueError(f"the patch grid needs at least one patch each way; got {grid}")
        if not 0.0 < min_aspect <= 1.0:
            raise ValueError(f"min_aspect must lie in (0, 1]; got {min_aspect}")
        if min_num_patches < 1:
            raise ValueError(f"min_num_patches must be >= 1; got {min_num_patches}")
        self.grid = grid
        self.max_num_patches = 0.5 * grid[0] * grid[1] if max_num_patches is None else max_num_patches
        self.min_num_patches = min_num_patches
        self._log_aspect_range = (math.log(min_aspect), -math.log(min_aspect))

    @property
    def num_patches(self) -> int:
        """Patches in the grid, N = h * w."""
        return self.grid[0] * self.grid[1]

    def __call__(self, num_masking_patches: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Return a mask, bool [h, w], with at most `num_masking_patches` entries True.

        Args:
            num_masking_patches: Wanted number of masked patches.
            rng: The only source of randomness; advanced.
        """
        mask = np.zeros(self.grid, dtype=np.bool_)
        num_masked = 0
        while num_masked < num_masking_patches:
            budget = min(num_masking_patches - num_masked, self.max_num_patches)
            num_added = self._add_block(mask, budget, rng)
            if num_added == 0:
                break
            num_masked += num_added
        return mask

    def _add_block(self, mask: npt.NDArray[np.bool_], budget: float, rng: np.random.Generator) -> int:
        """Mask one more rectangle in place that adds 1 to `budget` patches; return how many it added, 0 on failure."""
        grid_height, grid_width = self.grid
        for _ in range(_BLOCK_ATTEMPTS):
            # Not rng.uniform: the budget may lie below the least area, and then the range runs downwards.
            area = self.min_num_patches + (budget - self.min_num_patches) * rng.random()
            aspect = math.exp(rng.uniform(*self._log_aspect_range))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (height < grid_height and width < grid_width):
                continue
            top = int(rng.integers(0, grid_height - height + 1))
            left = int(rng.integers(0, grid_width - width + 1))
            block = mask[top : top + height, left : left + width]
            num_new = block.size - int(block.sum())
            if 0 < num_new <= budget:
                block[:] = True
                return num_new
        return 0


def draw_mask_sizes(
    num_crops: int, num_patches: int, probability: float, ratio_min_max: tuple[float, float], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return how many patches to mask in each of a batch of crops, int64 [num_crops]; 0: the crop gets no mask.

    `int(num_crops * probability)` crops get a mask. The range of ratios is cut into as many even bins; the i-th mask
    draws its ratio uniformly from the i-th bin, so that the total hardly varies. They are then shuffled over the crops.

    Args:
        num_crops: Number of crops, G * B.
        num_patches: Patches of a crop, N.
        probability: Share of the crops that get a mask, in [0, 1].
        ratio_min_max: Least and greatest share of masked patches in a crop that gets a mask.
        rng: The only source of randomness; advanced.

    Source: DINOv2, `collate_data_and_cast`.
    """
    num_masked_crops = int(num_crops * probability)
    bounds = np.linspace(*ratio_min_max, num_masked_crops + 1)
    ratios = np.zeros(num_crops)
    ratios[:num_masked_crops] = rng.uniform(bounds[:-1], bounds[1:])
    return (rng.permutation(ratios) * num_patches).astype(np.int64)
