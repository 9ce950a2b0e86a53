"""What every registered family promises, and the meaning of the parameters of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi import geometry
from dinov2_equi.equi.families import FAMILIES, SE2, FamilySettings, Rotation, TransformFamily, build_family

Noise = Callable[..., Tensor]

H, W = 21, 34
ROUNDING = 1e-5  # see test_geometry: float32 coordinates, values in [0, 1]
LIMITS = {"rotation": [45.0], "se2": [45.0, 10.0, 10.0]}  # the paper's Table 2

each_family = pytest.mark.parametrize("name", FAMILIES)


def draw(family: TransformFamily, batch_size: int, seed: int = 0) -> Tensor:
    return family.draw(batch_size, torch.Generator().manual_seed(seed))


def test_every_family_has_its_range_written_down_here() -> None:
    assert set(LIMITS) == set(FAMILIES)


# --------------------------------------------------------------------------------------------------------- every family


@each_family
def test_scale_by_zero_is_the_identity(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(4, 3, H, W)
    unmoved = family.apply(images, family.scale(draw(family, 4), 0.0))
    torch.testing.assert_close(unmoved, images, rtol=0, atol=ROUNDING)


@each_family
def test_scale_by_zero_changes_no_bit_where_sides_are_powers_of_two(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(4, 3, 16, 32)
    assert torch.equal(family.apply(images, family.scale(draw(family, 4), 0.0)), images)


@each_family
def test_scale_is_linear_and_ends_at_theta(name: str) -> None:
    family = build_family(name)
    theta = draw(family, 5)
    assert torch.equal(family.scale(theta, 1.0), theta)
    assert torch.equal(family.scale(theta, 0.5), theta / 2)
    torch.testing.assert_close(family.scale(theta, 1 / 3) * 3, theta, rtol=1e-6, atol=0)  # one rounding each way
    assert family.scale(theta, 0.25).shape == theta.shape


@each_family
def test_full_theta_changes_the_image(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(4, 3, H, W)
    changes = (family.apply(images, draw(family, 4)) - images).abs().amax(dim=(1, 2, 3))
    assert changes.min() > 0.1


@each_family
def test_draws_fill_their_range_and_never_leave_it(name: str) -> None:
    family, limits = build_family(name), torch.tensor(LIMITS[name])
    theta = draw(family, 20_000)
    assert theta.shape == (20_000, len(family.param_names)) == (20_000, len(limits))
    assert theta.dtype == torch.float32
    assert (theta.abs() <= limits).all()
    # 20 000 uniform draws miss the outer 0.1 % on one side with probability 0.9995^20000 = 5e-5.
    assert (theta.amax(dim=0) > 0.999 * limits).all()
    assert (theta.amin(dim=0) < -0.999 * limits).all()


@each_family
def test_draws_are_uniform_and_their_parameters_independent(name: str) -> None:
    family, limits = build_family(name), torch.tensor(LIMITS[name])
    unit = draw(family, 20_000) / limits
    # Standard errors: of the mean 0.577 / sqrt(20000) = 0.004, of a decile's count sqrt(1800) = 42; five of each.
    assert unit.mean(dim=0).abs().max() < 0.02
    for column in unit.T:
        assert (torch.histc(column, bins=10, min=-1, max=1) - 2000).abs().max() < 5 * 42
    if unit.shape[1] > 1:
        correlations = torch.corrcoef(unit.T) - torch.eye(unit.shape[1])
        assert correlations.abs().max() < 0.035  # five times 1 / sqrt(20000)


@each_family
def test_draws_depend_on_the_generator_alone(name: str) -> None:
    family = build_family(name)
    before = torch.get_rng_state()
    assert torch.equal(draw(family, 6, seed=3), draw(family, 6, seed=3))
    assert not torch.equal(draw(family, 6, seed=3), draw(family, 6, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


@each_family
def test_apply_with_one_step_equals_apply_without_the_step_axis(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(3, 3, H, W)
    theta = draw(family, 3)
    plain, stepped = family.apply(images, theta), family.apply(images, theta.unsqueeze(0))
    assert plain.shape == (3, 3, H, W)
    assert stepped.shape == (1, 3, 3, H, W)
    assert torch.equal(stepped[0], plain)


@each_family
def test_apply_with_many_steps_equals_one_call_a_step(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(3, 3, H, W)
    theta = torch.stack([draw(family, 3, seed) for seed in range(4)])  # [S, B, P]
    together = family.apply(images, theta)
    for s in range(4):
        assert torch.equal(together[s], family.apply(images, theta[s]))


@each_family
def test_apply_stays_within_zero_and_one(name: str, noise: Noise) -> None:
    family = build_family(name)
    changed = family.apply(noise(8, 3, H, W), draw(family, 8))
    assert changed.dtype == torch.float32
    assert changed.min() >= -1e-6  # the weights of the bilinear mean add up to 1 within rounding
    assert changed.max() <= 1 + 1e-6


@each_family
@pytest.mark.parametrize("fill", geometry.FILLS)
def test_fill_of_the_settings_reaches_the_corners(name: str, fill: str) -> None:
    family = build_family(name, FamilySettings(fill=fill))
    theta = torch.tensor([[45.0, 0.0, 0.0][: len(family.param_names)]])
    corner = family.apply(torch.ones(1, 3, H, W), theta)[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((3,), 1.0 if fill == "reflect" else 0.0), rtol=0, atol=1e-6)


@each_family
def test_ranges_of_zero_give_the_identity(name: str, noise: Noise) -> None:
    family = build_family(name, FamilySettings(max_rotation_deg=0.0, max_translation_px=0.0))
    images = noise(2, 3, H, W)
    torch.testing.assert_close(family.apply(images, draw(family, 2)), images, rtol=0, atol=ROUNDING)


@each_family
def test_range_of_the_settings_is_the_range_of_the_draws(name: str) -> None:
    family = build_family(name, FamilySettings(max_rotation_deg=7.0, max_translation_px=3.0))
    theta = draw(family, 5000).abs().amax(dim=0)
    expected = torch.tensor([7.0, 3.0, 3.0])[: theta.numel()]
    assert (theta <= expected).all()
    assert (theta > 0.98 * expected).all()  # 5000 draws miss the outer 2 % with probability 1e-44


# ------------------------------------------------------------------------------------------------ meaning of parameters


def test_rotation_turns_counter_clockwise(noise: Noise) -> None:
    images = noise(2, 3, 9, 9)
    turned = Rotation(FamilySettings()).apply(images, torch.tensor([[90.0], [-90.0]]))
    torch.testing.assert_close(turned[0], torch.rot90(images[0], 1, dims=(-2, -1)), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(turned[1], torch.rot90(images[1], -1, dims=(-2, -1)), rtol=0, atol=ROUNDING)


def test_se2_without_translation_is_the_rotation(noise: Noise) -> None:
    images, settings = noise(2, 3, H, W), FamilySettings()
    angles = torch.tensor([[30.0], [-12.0]])
    theta = torch.cat([angles, torch.zeros(2, 2)], dim=1)
    assert torch.equal(SE2(settings).apply(images, theta), Rotation(settings).apply(images, angles))


def test_se2_translates_right_and_down_by_pixels_of_the_published_crop(noise: Noise) -> None:
    images = noise(1, 3, 28, 56)  # shorter side 224 / 8, so that 8 published pixels are 1
    shifted = SE2(FamilySettings()).apply(images, torch.tensor([[0.0, 16.0, 8.0]]))
    torch.testing.assert_close(shifted[..., 1:, 2:], images[..., :-1, :-2], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [(224, 224), (224, 448), (448, 224)])
def test_translation_is_the_published_one_where_the_shorter_side_is_224(size: tuple[int, int]) -> None:
    maps = SE2(FamilySettings()).maps(torch.tensor([0.0, 10.0, -7.0]), size)
    torch.testing.assert_close(maps, geometry.translation(torch.tensor([10.0, -7.0])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (96, 300), (300, 96)])
def test_translation_scales_with_the_shorter_side(size: tuple[int, int]) -> None:
    maps = SE2(FamilySettings()).maps(torch.tensor([0.0, 10.0, -7.0]), size)
    expected = geometry.translation(torch.tensor([10.0, -7.0]) * 96 / 224)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)


def test_se2_rotates_first_so_that_the_centre_moves_by_the_translation() -> None:
    maps = SE2(FamilySettings()).maps(torch.tensor([40.0, 10.0, -7.0]), (112, 300))
    centre = geometry.transform_points(maps, torch.zeros(1, 2))
    torch.testing.assert_close(centre, torch.tensor([[5.0, -3.5]]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- registry


def test_default_settings_are_the_published_ones() -> None:
    assert FamilySettings() == FamilySettings(max_rotation_deg=45.0, max_translation_px=10.0, fill="reflect")


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        build_family("se3")
    assert "'se3'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_registered_family_is_built_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[FamilySettings] = []

    def build(settings: FamilySettings) -> TransformFamily:
        received.append(settings)
        return Rotation(settings)

    monkeypatch.setitem(FAMILIES, "mine", build)
    settings = FamilySettings(max_rotation_deg=5.0)
    assert isinstance(build_family("mine", settings), Rotation)
    assert received == [settings]
