"""Drawn transforms follow from seed and position alone; the path has the points of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.families.registry import FAMILIES, build_family
from dinov2_equi.equi.sampling import draw_patches, draw_theta, path_points

each_family = pytest.mark.parametrize("name", FAMILIES)


def positions(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# ----------------------------------------------------------------------------------------------------------- draw_theta


@each_family
def test_theta_does_not_depend_on_the_batch_around_it(name: str) -> None:
    family = build_family(name)
    together = draw_theta(family, positions(5, 9, 2, 1_000_000), seed=3)
    assert together.shape == (4, len(family.param_names))
    for row, position in enumerate((5, 9, 2, 1_000_000)):
        assert torch.equal(draw_theta(family, positions(position), seed=3)[0], together[row])


@each_family
def test_theta_follows_its_position_when_the_batch_is_reordered(name: str) -> None:
    family = build_family(name)
    forward, backward = draw_theta(family, torch.arange(16), 0), draw_theta(family, torch.arange(16).flip(0), 0)
    assert torch.equal(forward, backward.flip(0))


def test_theta_is_the_same_at_every_call() -> None:
    family = build_family("se2")
    assert torch.equal(draw_theta(family, torch.arange(8), 1), draw_theta(family, torch.arange(8), 1))


def test_theta_differs_between_positions_and_between_seeds() -> None:
    family = build_family("rotation")
    draws = torch.cat([draw_theta(family, torch.arange(200), seed) for seed in range(3)])
    # The seed and the position must not be added up: (0, 1) and (1, 0) are different samples.
    assert len(draws.unique()) == len(draws)


def test_theta_neither_reads_nor_moves_global_random_state() -> None:
    family = build_family("se2")
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())
    first = draw_theta(family, torch.arange(4), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before
    torch.manual_seed(1)
    assert torch.equal(draw_theta(family, torch.arange(4), 0), first)


def test_theta_of_successive_positions_is_uniform_and_uncorrelated() -> None:
    family = build_family("se2")
    unit = draw_theta(family, torch.arange(3000), 0) / torch.tensor([45.0, 10.0, 10.0])
    assert unit.abs().max() <= 1
    # Five standard errors: 0.577 / sqrt(3000) for the mean, 1 / sqrt(3000) for correlations.
    assert unit.mean(dim=0).abs().max() < 0.053
    assert unit.square().mean(dim=0).sub(1 / 3).abs().max() < 0.03  # 5 * 0.298 / sqrt(3000)
    neighbours = torch.corrcoef(torch.cat([unit[:-1], unit[1:]], dim=1).T)
    assert (neighbours - torch.eye(6)).abs().max() < 0.092


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("position", [0, 2**40])
def test_largest_seed_and_position_are_accepted(seed: int, position: int) -> None:
    theta = draw_theta(build_family("se2"), positions(position), seed)
    assert torch.isfinite(theta).all()


# ---------------------------------------------------------------------------------------------------------- path_points


def test_two_steps_lie_at_one_third_and_two_thirds_and_theta_comes_last() -> None:
    theta = torch.tensor([[30.0, 9.0, -6.0], [-45.0, 0.0, 3.0]])
    points = path_points(build_family("se2"), theta, num_steps=2)
    expected = torch.tensor([[[10.0, 3.0, -2.0], [-15.0, 0.0, 1.0]], [[20.0, 6.0, -4.0], [-30.0, 0.0, 2.0]]])
    torch.testing.assert_close(points[:2], expected, rtol=1e-6, atol=0)  # 1/3 is rounded once
    assert torch.equal(points[2], theta)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 7])
def test_points_are_equidistant_and_leave_out_the_identity(num_steps: int) -> None:
    theta = torch.tensor([[24.0], [-8.0]])
    points = path_points(build_family("rotation"), theta, num_steps)
    assert points.shape == (num_steps + 1, 2, 1)
    for k in range(1, num_steps + 2):
        torch.testing.assert_close(points[k - 1], k * theta / (num_steps + 1), rtol=1e-6, atol=0)


@each_family
def test_the_end_of_the_path_is_theta_bit_for_bit(name: str) -> None:
    family = build_family(name)
    theta = draw_theta(family, torch.arange(6), seed=0)
    for num_steps in (0, 1, 2, 3):
        points = path_points(family, theta, num_steps)
        assert points.shape == (num_steps + 1, 6, len(family.param_names))
        assert torch.equal(points[-1], theta)


def test_path_of_the_blur_starts_at_no_blur_and_not_at_its_least_sigma() -> None:
    # Sigma is uniform in [0.1, 2], but a third of 0.3 is 0.1 and a third of 0.1 lies below the range.
    points = path_points(build_family("blur"), torch.tensor([[0.3], [0.1]]), 2)
    expected = torch.tensor([[[0.1], [0.1 / 3]], [[0.2], [0.2 / 3]], [[0.3], [0.1]]])
    torch.testing.assert_close(points, expected, rtol=1e-6, atol=0)


def test_path_of_a_mixture_keeps_the_drawn_member() -> None:
    family = build_family("mixture")
    theta = draw_theta(family, torch.arange(30), seed=0)
    assert len(theta[:, 0].unique()) == 3
    points = path_points(family, theta, 3)
    for k in range(1, 5):
        assert torch.equal(points[k - 1, :, 0], theta[:, 0])
        torch.testing.assert_close(points[k - 1, :, 1:], theta[:, 1:] * k / 4, rtol=1e-6, atol=0)


def test_path_is_scaled_by_the_family_itself() -> None:
    class Ratio:
        """A size ratio, whose identity is 1 and not 0."""

        param_names: tuple[str, ...] = ("ratio",)

        def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
            return 1 + torch.rand(batch_size, 1, generator=generator)

        def scale(self, theta: Tensor, fraction: float) -> Tensor:
            return 1 + (theta - 1) * fraction

        def normalized(self, theta: Tensor) -> Tensor:
            return 2 * theta - 3

        def apply(self, images: Tensor, theta: Tensor) -> Tensor:
            raise AssertionError("a path needs no image")

    points = path_points(Ratio(), torch.tensor([[4.0]]), 2)
    torch.testing.assert_close(points.flatten(), torch.tensor([2.0, 3.0, 4.0]), rtol=1e-6, atol=0)


def test_path_with_a_negative_number_of_steps_is_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match="num_steps >= 0, got -1"):
        path_points(build_family("rotation"), torch.zeros(1, 1), -1)


# --------------------------------------------------------------------------------------------------------- draw_patches


@pytest.mark.parametrize("count", [1, 6, 15])
def test_patches_of_an_image_are_different_ones(count: int) -> None:
    chosen = draw_patches(torch.arange(4), 0, num_patches=15, count=count)
    assert chosen.shape == (4, count)
    assert chosen.dtype == torch.int64
    for patches in chosen.tolist():
        assert len(set(patches)) == count
        assert set(patches) <= set(range(15))


def test_patches_do_not_depend_on_the_batch_around_them() -> None:
    together = draw_patches(positions(5, 9, 2), 3, num_patches=15, count=6)
    alone = draw_patches(positions(9), 3, num_patches=15, count=6)
    assert torch.equal(together[1], alone[0])


def test_patches_are_drawn_for_each_image_seed_and_step_anew() -> None:
    chosen = [draw_patches(torch.arange(20), seed, num_patches=15, count=6) for seed in (0, 1)]
    assert not torch.equal(*chosen)
    assert len({tuple(sorted(row)) for row in torch.cat(chosen).tolist()}) > 30  # 40 of 5005 subsets
    assert torch.bincount(torch.cat(chosen).flatten(), minlength=15).min() > 0  # no patch is left out: 16 expected


def test_patches_are_drawn_from_the_random_state_of_the_process() -> None:
    before = torch.get_rng_state()
    draw_patches(torch.arange(4), 0, num_patches=15, count=6)
    assert torch.equal(torch.get_rng_state(), before)
