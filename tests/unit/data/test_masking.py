"""Block masks and how many of them a batch gets."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_equi.data.masking import MaskingGenerator, draw_mask_sizes


def draw_masks(
    generator: MaskingGenerator,
    num_crops: int,
    probability: float,
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return masks of a batch of crops, bool [num_crops, N]."""
    sizes = draw_mask_sizes(num_crops, generator.num_patches, probability, ratio, rng)
    return np.stack([generator(int(size), rng).flatten() for size in sizes])


@pytest.mark.parametrize("grid", [(16, 16), (6, 11), (14, 7), (8, 8), (4, 4)])
def test_mask_never_holds_more_patches_than_wanted(grid: tuple[int, int]) -> None:
    generator = MaskingGenerator(grid)
    rng = np.random.default_rng(0)
    for wanted in range(grid[0] * grid[1] + 1):
        mask = generator(wanted, rng)
        assert mask.shape == grid and mask.dtype == np.bool_
        assert mask.sum() <= wanted


def test_mask_comes_close_to_the_wanted_number() -> None:
    generator = MaskingGenerator((12, 16))
    rng = np.random.default_rng(0)
    shares = [generator(60, rng).sum() / 60 for _ in range(300)]
    assert np.mean(shares) > 0.9


def test_zero_wanted_masks_nothing() -> None:
    assert not MaskingGenerator((5, 9))(0, np.random.default_rng(0)).any()


def test_one_patch_grid_ends() -> None:
    assert not MaskingGenerator((1, 1))(1, np.random.default_rng(0)).any()


def test_mask_of_one_block_is_a_rectangle_within_the_aspect_bounds() -> None:
    generator = MaskingGenerator((30, 40), min_num_patches=100)
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = np.zeros((30, 40), dtype=np.bool_)
        added = generator._add_block(mask, 200, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert added == mask.sum() == height * width
        assert 0.3 * 0.85 < height / width < 1 / 0.3 / 0.85  # sides are rounded to whole patches
        assert added <= 200


def test_block_adds_at_most_half_the_grid() -> None:
    assert MaskingGenerator((6, 8)).max_num_patches == 24
    mask = np.zeros((6, 8), dtype=np.bool_)
    rng = np.random.default_rng(0)
    assert all(MaskingGenerator((6, 8), 5)._add_block(mask.copy(), 5, rng) <= 5 for _ in range(200))


def test_every_patch_is_masked_at_some_time() -> None:
    generator = MaskingGenerator((7, 9))
    rng = np.random.default_rng(0)
    frequency = np.mean([generator(20, rng) for _ in range(1500)], axis=0)
    assert frequency.min() > 0.05  # corners included
    # No side is preferred: the map equals its mirror images within the noise of 1500 draws.
    assert np.abs(frequency - frequency[::-1]).max() < 0.09
    assert np.abs(frequency - frequency[:, ::-1]).max() < 0.09


def test_mask_is_a_function_of_the_generator() -> None:
    generator = MaskingGenerator((8, 10))
    masks = [generator(30, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.0, 0), (0.5, 8), (0.49, 7), (1.0, 16)], ids=["0", "half", "rounds down", "1"]
)
def test_share_of_masked_crops(probability: float, expected: int) -> None:
    masks = draw_masks(MaskingGenerator((8, 6)), 16, probability, (0.2, 0.5), np.random.default_rng(0))
    assert masks.shape == (16, 48) and masks.dtype == np.bool_
    assert masks.any(axis=1).sum() == expected


def test_ratios_are_spread_over_even_bins() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = np.sort(draw_masks(MaskingGenerator((16, 16)), 8, 1.0, (0.1, 0.5), rng).sum(1))
        assert (counts <= (256 * np.linspace(0.1, 0.5, 9)[1:]).astype(int)).all()
        assert counts[-1] > 2 * counts[0]


def test_masked_crops_stand_anywhere_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    frequency = np.mean(
        [draw_masks(MaskingGenerator((6, 6)), 8, 0.5, (0.2, 0.5), rng).any(1) for _ in range(400)], axis=0
    )
    assert np.abs(frequency - 0.5).max() < 0.1  # four standard deviations over 400 draws


def test_numbers_equal_those_measured_on_dinov2() -> None:
    # 16 crops of 16 x 16 patches, half of them masked, ratios 0.1 .. 0.5: the reference code masks 610 patches a
    # batch on average, with an upper bound of 663.
    bound = (256 * np.linspace(0.1, 0.5, 9)[1:]).astype(int).sum()
    rng = np.random.default_rng(0)
    totals = [draw_masks(MaskingGenerator((16, 16)), 16, 0.5, (0.1, 0.5), rng).sum() for _ in range(150)]
    assert bound == 663
    assert max(totals) <= bound
    assert np.mean(totals) == pytest.approx(610, abs=8)  # the recorded mean is over few batches


@pytest.mark.parametrize(
    "arguments",
    [{"grid": (0, 4)}, {"grid": (4, 4), "min_aspect": 0.0}, {"grid": (4, 4), "min_num_patches": 0}],
)
def test_faulty_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"patch grid|min_aspect|min_num_patches"):
        MaskingGenerator(**arguments)  # type: ignore[arg-type]
