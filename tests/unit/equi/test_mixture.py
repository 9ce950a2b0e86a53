"""A mixture gives each image one member, and does to it what the member alone does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.mixture import Mixture
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, build_family
from dinov2_equi.equi.sampling import draw_theta, path_points

Noise = Callable[..., Tensor]

H, W = 21, 34
ALL = tuple(name for name in FAMILIES if name != MIXTURE)
MIXTURES = {"default": FamilySettings().mixture, "two": ("rotation", "blur"), "all": ALL}
each_mixture = pytest.mark.parametrize("names", MIXTURES.values(), ids=MIXTURES.keys())


def mixture(names: tuple[str, ...] = FamilySettings().mixture) -> Mixture:
    family = build_family(MIXTURE, FamilySettings(mixture=names))
    assert isinstance(family, Mixture)
    return family


def draw(family: Mixture, count: int, seed: int = 0) -> Tensor:
    return family.draw(count, torch.Generator().manual_seed(seed))


def columns_of(family: Mixture) -> dict[str, list[int]]:
    """Return the places of each member's parameters, read from their names."""
    return {
        name: [index for index, param in enumerate(family.param_names) if param.startswith(f"{name}.")]
        for name in family.members
    }


# ----------------------------------------------------------------------------------------------------------------- draw


def test_members_of_the_default_are_motion_colour_and_blur() -> None:
    assert tuple(mixture().members) == ("se2", "color", "blur")


@each_mixture
def test_parameters_are_the_number_of_the_member_and_those_of_all_members(names: tuple[str, ...]) -> None:
    family = mixture(names)
    expected = ["member"]
    for name in names:
        expected += [f"{name}.{param}" for param in build_family(name).param_names]
    assert list(family.param_names) == expected
    assert draw(family, 5).shape == (5, len(expected))
    assert draw(family, 5).dtype == torch.float32


@each_mixture
def test_each_member_is_drawn_with_its_share(names: tuple[str, ...]) -> None:
    count, share = 20_000, 1 / len(names)
    shares = torch.bincount(draw(mixture(names), count)[:, 0].long(), minlength=len(names)) / count
    assert len(shares) == len(names)
    assert (shares - share).abs().max() < 5 * (share * (1 - share) / count) ** 0.5  # five standard errors


def test_members_of_successive_positions_have_their_share_and_are_independent() -> None:
    drawn = draw_theta(mixture(("rotation", "blur")), torch.arange(4000), seed=0)[:, 0]
    assert abs(drawn.mean().item() - 0.5) < 0.04  # five times 0.5 / sqrt(4000)
    assert torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].abs() < 0.08


@each_mixture
def test_parameters_of_the_members_not_drawn_are_zero(names: tuple[str, ...]) -> None:
    family = mixture(names)
    theta = draw(family, 2000)
    for index, columns in enumerate(columns_of(family).values()):
        drawn = theta[:, 0] == index
        assert torch.count_nonzero(theta[~drawn][:, columns]) == 0
        assert (theta[drawn][:, columns] != 0).all()  # a uniform draw is not exactly zero


@each_mixture
def test_parameters_of_the_drawn_member_fill_its_range(names: tuple[str, ...]) -> None:
    family = mixture(names)
    theta = draw(family, 4000)
    for index, (name, columns) in enumerate(columns_of(family).items()):
        own = build_family(name).normalized(theta[theta[:, 0] == index][:, columns])
        assert own.abs().max() <= 1 + 1e-6
        # At least 400 draws miss the outer 3 % of a range on one side with probability 5e-6.
        assert (own.amin(dim=0) < -0.94).all() and (own.amax(dim=0) > 0.94).all()
        assert own.mean(dim=0).abs().max() < 0.145  # five times 0.577 / sqrt(400)


# ------------------------------------------------------------------------------------------------------ scale and apply


@each_mixture
def test_each_image_is_what_its_member_alone_makes_of_it(names: tuple[str, ...], noise: Noise) -> None:
    family, images = mixture(names), noise(24, 3, H, W)
    theta = draw(family, 24)
    assert len(theta[:, 0].unique()) == len(names)  # every member is met
    changed = family.apply(images, theta)
    columns = columns_of(family)
    for image, row, result in zip(images, theta, changed, strict=True):
        name = names[int(row[0])]
        alone = build_family(name).apply(image.unsqueeze(0), row[columns[name]].unsqueeze(0))[0]
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-6)


@each_mixture
def test_points_of_the_path_keep_the_member_and_make_its_images(names: tuple[str, ...], noise: Noise) -> None:
    family, images = mixture(names), noise(12, 3, H, W)
    theta = draw(family, 12, seed=5)
    points = path_points(family, theta, 2)
    path = family.apply(images, points)
    assert path.shape == (3, 12, 3, H, W)
    columns = columns_of(family)
    for k in range(3):
        assert torch.equal(points[k, :, 0], theta[:, 0])
        for b, name in enumerate(names[int(index)] for index in theta[:, 0]):
            own = theta[b : b + 1, columns[name]] * (k + 1) / 3
            alone = build_family(name).apply(images[b : b + 1], own)[0]
            torch.testing.assert_close(path[k, b], alone, rtol=0, atol=1e-5)  # thirds round


@each_mixture
def test_scale_leaves_the_member_and_is_linear_in_the_rest(names: tuple[str, ...]) -> None:
    family = mixture(names)
    theta = draw(family, 20)
    assert torch.equal(family.scale(theta, 1.0), theta)
    for fraction in (0.0, 0.5):
        scaled = family.scale(theta, fraction)
        assert torch.equal(scaled[:, 0], theta[:, 0])
        assert torch.equal(scaled[:, 1:], theta[:, 1:] * fraction)


@pytest.mark.parametrize("index", range(3))
def test_batch_in_which_all_images_drew_the_same_member(index: int, noise: Noise) -> None:
    family, images = mixture(), noise(4, 3, H, W)
    theta = draw(family, 200)
    theta = theta[theta[:, 0] == index][:4]
    name = tuple(family.members)[index]
    alone = build_family(name).apply(images, theta[:, columns_of(family)[name]])
    assert torch.equal(family.apply(images, theta), alone)


def test_fill_and_ranges_of_the_settings_reach_the_members() -> None:
    settings = FamilySettings(mixture=("rotation", "blur"), fill="zeros", max_rotation_deg=5.0)
    family = build_family(MIXTURE, settings)
    assert isinstance(family, Mixture)
    theta = draw(family, 500)
    assert theta[:, 1].abs().max() <= 5.0
    assert theta[:, 1].abs().max() > 4.8  # 250 draws miss the outer 4 % with probability 4e-5
    turned = family.apply(torch.ones(1, 3, 21, 34), torch.tensor([[0.0, 45.0, 0.0]]))
    assert turned[0, :, 0, 0].max() == 0.0


# ----------------------------------------------------------------------------------------------------------- normalized


@each_mixture
def test_normalized_parameters_of_a_draw_lie_between_minus_one_and_one(names: tuple[str, ...]) -> None:
    family = mixture(names)
    shares = family.normalized(draw(family, 1000))
    assert shares.shape == (1000, len(family.param_names))
    assert shares.abs().max() <= 1 + 1e-6
    assert shares.isfinite().all()


def test_normalized_blur_that_was_not_drawn_counts_as_the_least_one() -> None:
    # Without a bound, no blur would be 39 half ranges below this range, and outweigh all else in a mean square.
    family = build_family(MIXTURE, FamilySettings(mixture=("rotation", "blur"), blur_sigma_px=(1.9, 2.0)))
    assert family.normalized(torch.tensor([[0.0, 9.0, 0.0]])).tolist() == [[-1.0, pytest.approx(0.2), -1.0]]


@each_mixture
def test_normalized_keeps_the_members_own_shares_and_spreads_their_numbers(names: tuple[str, ...]) -> None:
    family = mixture(names)
    theta = draw(family, 200)
    shares = family.normalized(theta)
    torch.testing.assert_close(shares[:, 0], 2 * theta[:, 0] / (len(names) - 1) - 1, rtol=0, atol=1e-6)
    for index, (name, columns) in enumerate(columns_of(family).items()):
        drawn = theta[:, 0] == index
        torch.testing.assert_close(
            shares[drawn][:, columns], build_family(name).normalized(theta[drawn][:, columns]), rtol=0, atol=1e-6
        )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("names", "text"), [((), "got none"), (("se2",), "got se2"), (("blur", "blur"), "got blur")])
def test_fewer_than_two_families_are_refused(names: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=f"at least two families, {text}"):
        build_family(MIXTURE, FamilySettings(mixture=names))


def test_unknown_member_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown transform family 'shear'; choose one of rotation"):
        build_family(MIXTURE, FamilySettings(mixture=("se2", "shear")))
