"""What every registered family promises, and what the parameters of the planar ones mean, on images not square."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from dinov2_equi.equi import geometry
from dinov2_equi.equi.families.base import FamilySettings, GeometricFamily, TransformFamily, published_pixels
from dinov2_equi.equi.families.geometric import SE2, Perspective, Rotation, Similarity, Translation, Zoom
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, build_family

if TYPE_CHECKING:
    from tests.unit.equi.conftest import Wave

Noise = Callable[..., Tensor]
SlowWarp = Callable[[Tensor, Tensor, str], Tensor]

H, W = 21, 34
ROUNDING = 1e-5  # see test_geometry: float32 coordinates, values in [0, 1]
NARROW = FamilySettings(
    max_rotation_deg=7.0,
    max_translation_px=3.0,
    max_brightness=0.2,
    max_contrast=0.3,
    max_saturation=0.05,
    max_hue=0.02,
    blur_sigma_px=(0.5, 0.9),
    max_zoom=1.1,
    max_corner_px=5.0,
)
STILL = FamilySettings(
    max_rotation_deg=0.0,
    max_translation_px=0.0,
    max_brightness=0.0,
    max_contrast=0.0,
    max_saturation=0.0,
    max_hue=0.0,
    blur_sigma_px=(0.0, 0.0),
    max_zoom=1.0,
    max_corner_px=0.0,
)
GEOMETRIC: dict[str, type[GeometricFamily]] = {
    "rotation": Rotation,
    "translation": Translation,
    "se2": SE2,
    "scale": Zoom,
    "similarity": Similarity,
    "perspective": Perspective,
}
RANGED = (*GEOMETRIC, "color", "blur")

each_family = pytest.mark.parametrize("name", FAMILIES)
each_ranged = pytest.mark.parametrize("name", RANGED)  # a mixture draws a member first: see test_mixture
each_geometric = pytest.mark.parametrize("name", GEOMETRIC)
each_fill = pytest.mark.parametrize("fill", geometry.FILLS)
each_size = pytest.mark.parametrize("size", [(40, 56), (56, 40), (37, 91)])


def ranges(settings: FamilySettings) -> dict[str, Tensor]:
    """Return the least and greatest value [P, 2] of each parameter of each family."""
    turn, zoom = [settings.max_rotation_deg], [math.log(settings.max_zoom)]
    shift, corners = [settings.max_translation_px] * 2, [settings.max_corner_px] * 8
    color = [settings.max_brightness, settings.max_contrast, settings.max_saturation, settings.max_hue]
    limits = {
        "rotation": turn,
        "translation": shift,
        "se2": turn + shift,
        "scale": zoom,
        "similarity": turn + zoom + shift,
        "perspective": corners,
        "color": color,
    }
    symmetric = {name: torch.tensor([[-limit, limit] for limit in values]) for name, values in limits.items()}
    return {**symmetric, "blur": torch.tensor([settings.blur_sigma_px])}


def draw(family: TransformFamily, batch_size: int, seed: int = 0) -> Tensor:
    return family.draw(batch_size, torch.Generator().manual_seed(seed))


def planar(name: str, settings: FamilySettings | None = None) -> GeometricFamily:
    return GEOMETRIC[name](settings or FamilySettings())


def test_every_family_is_tested_here_or_with_the_mixture() -> None:
    assert {*RANGED, MIXTURE} == set(FAMILIES)
    assert all(isinstance(build_family(name), GEOMETRIC[name]) for name in GEOMETRIC)


# --------------------------------------------------------------------------------------------------------------- ranges


def test_default_ranges_are_the_published_ones() -> None:
    """The paper's Table 2; zoom and corners are ours."""
    ours = {name: bounds.tolist() for name, bounds in ranges(FamilySettings()).items()}
    assert ours["rotation"] == [[-45.0, 45.0]]
    assert ours["translation"] == [[-10.0, 10.0]] * 2
    assert ours["se2"] == [[-45.0, 45.0], [-10.0, 10.0], [-10.0, 10.0]]
    assert ours["color"] == [pytest.approx([-limit, limit]) for limit in (0.4, 0.4, 0.1, 0.1)]
    assert ours["blur"] == [pytest.approx([0.1, 2.0])]
    assert ours["scale"] == [pytest.approx([-math.log(1.25), math.log(1.25)])]
    assert ours["perspective"] == [[-20.0, 20.0]] * 8
    assert FamilySettings().fill == "reflect"


def test_parameters_are_named_with_their_units() -> None:
    assert build_family("rotation").param_names == ("rotation_deg",)
    assert build_family("translation").param_names == ("translation_x_px", "translation_y_px")
    assert build_family("se2").param_names == ("rotation_deg", "translation_x_px", "translation_y_px")
    assert build_family("scale").param_names == ("log_zoom",)
    assert build_family("similarity").param_names == (
        "rotation_deg",
        "log_zoom",
        "translation_x_px",
        "translation_y_px",
    )
    assert build_family("color").param_names == ("brightness", "contrast", "saturation", "hue_turns")
    assert build_family("blur").param_names == ("sigma_px",)
    assert build_family("perspective").param_names == (
        *("top_left_x_px", "top_left_y_px", "top_right_x_px", "top_right_y_px"),
        *("bottom_right_x_px", "bottom_right_y_px", "bottom_left_x_px", "bottom_left_y_px"),
    )


@pytest.mark.parametrize("settings", [FamilySettings(), NARROW], ids=["published", "narrow"])
@each_ranged
def test_draws_fill_the_range_of_the_settings_and_never_leave_it(name: str, settings: FamilySettings) -> None:
    family, (low, high) = build_family(name, settings), ranges(settings)[name].unbind(dim=1)
    theta = draw(family, 20_000)
    assert theta.shape == (20_000, len(family.param_names)) == (20_000, len(low))
    assert theta.dtype == torch.float32
    # 20 000 uniform draws miss the outer 0.1 % of the range on one side with probability 0.999^20000 = 2e-9. The range
    # itself is met to the rounding of its ends.
    margin, rounding = 0.001 * (high - low), 1e-6 * high
    assert (theta >= low - rounding).all() and (theta <= high + rounding).all()
    assert (theta.amax(dim=0) > high - margin).all()
    assert (theta.amin(dim=0) < low + margin).all()


@each_ranged
def test_draws_are_uniform_and_their_parameters_independent(name: str) -> None:
    low, high = ranges(FamilySettings())[name].unbind(dim=1)
    unit = 2 * (draw(build_family(name), 20_000) - low) / (high - low) - 1  # [20000, P] in [-1, 1]
    # Standard errors: of the mean 0.577 / sqrt(20000) = 0.004, of a decile's count sqrt(1800) = 42; five of each.
    assert unit.mean(dim=0).abs().max() < 0.02
    for column in unit.T:
        assert (torch.histc(column, bins=10, min=-1, max=1) - 2000).abs().max() < 5 * 42
    if unit.shape[1] > 1:
        correlations = torch.corrcoef(unit.T) - torch.eye(unit.shape[1])
        assert correlations.abs().max() < 0.035  # five times 1 / sqrt(20000)


@each_ranged
def test_draws_of_one_image_are_independent_of_the_next_one(name: str) -> None:
    theta = draw(build_family(name), 20_001)
    pairs = torch.corrcoef(torch.cat([theta[:-1], theta[1:]], dim=1).T)
    assert (pairs - torch.eye(len(pairs))).abs().max() < 0.035  # five times 1 / sqrt(20000)


@each_family
def test_draws_depend_on_the_generator_alone(name: str) -> None:
    family = build_family(name)
    before = torch.get_rng_state()
    assert torch.equal(draw(family, 6, seed=3), draw(family, 6, seed=3))
    assert not torch.equal(draw(family, 6, seed=3), draw(family, 6, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


@each_ranged
def test_normalized_runs_from_minus_one_to_one(name: str) -> None:
    family, (low, high) = build_family(name), ranges(FamilySettings())[name].unbind(dim=1)
    ends = family.normalized(torch.stack([low, (low + high) / 2, high]))
    expected = torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, len(low))
    torch.testing.assert_close(ends, expected, rtol=0, atol=1e-6)
    drawn = family.normalized(draw(family, 1000))
    assert drawn.abs().max() <= 1 + 1e-6
    assert drawn.amin() < -0.9 and drawn.amax() > 0.9


@each_ranged
def test_normalized_is_zero_and_finite_where_the_range_is_a_point(name: str) -> None:
    family = build_family(name, STILL)
    assert torch.equal(family.normalized(draw(family, 4)), torch.zeros(4, len(family.param_names)))


# ------------------------------------------------------------------------------------------------------ scale and apply


@each_family
def test_scale_by_zero_is_the_identity(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(8, 3, H, W)
    unmoved = family.apply(images, family.scale(draw(family, 8), 0.0))
    torch.testing.assert_close(unmoved, images, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", [*GEOMETRIC, "blur"])  # the hue goes through HSV and back, which rounds
def test_scale_by_zero_changes_no_bit_where_sides_are_powers_of_two(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(4, 3, 16, 32)
    assert torch.equal(family.apply(images, family.scale(draw(family, 4), 0.0)), images)


@each_ranged
def test_scale_is_linear_and_ends_at_theta(name: str) -> None:
    family = build_family(name)
    theta = draw(family, 5)
    assert torch.equal(family.scale(theta, 1.0), theta)
    assert torch.equal(family.scale(theta, 0.5), theta / 2)
    assert torch.equal(family.scale(theta, 0.0), torch.zeros_like(theta))
    torch.testing.assert_close(family.scale(theta, 1 / 3) * 3, theta, rtol=1e-6, atol=0)  # one rounding each way
    assert family.scale(theta, 0.25).shape == theta.shape


@each_ranged
def test_full_theta_changes_the_image_and_a_third_of_it_changes_it_less(name: str, noise: Noise) -> None:
    family, bounds = build_family(name), ranges(FamilySettings())[name]
    # A smooth image: noise is as far from itself after a small motion as after a large one.
    images = ndimage.gaussian_filter(noise(1, 3, 56, 80).numpy(), sigma=(0, 0, 6, 6), mode="wrap")
    images = torch.from_numpy((images - images.min()) / (images.max() - images.min()))
    sharp = noise(1, 3, 56, 80) if name == "blur" else images  # a smooth image is blurred already
    theta = bounds[:, 1] * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0])[: len(bounds)]
    whole, third = ((family.apply(sharp, family.scale(theta[None], f)) - sharp).abs().mean() for f in (1.0, 1 / 3))
    assert whole > 0.01
    assert 0.1 * whole < third < 0.9 * whole


@each_family
def test_apply_with_one_step_equals_apply_without_the_step_axis(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W)
    theta = draw(family, 6)
    plain, stepped = family.apply(images, theta), family.apply(images, theta.unsqueeze(0))
    assert plain.shape == (6, 3, H, W)
    assert stepped.shape == (1, 6, 3, H, W)
    assert torch.equal(stepped[0], plain)


@each_family
def test_apply_with_many_steps_equals_one_call_a_step(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W)
    theta = torch.stack([family.scale(draw(family, 6), f) for f in (0.2, 0.5, 0.9, 1.0)])  # [S, B, P]
    together = family.apply(images, theta)
    assert together.shape == (4, 6, 3, H, W)
    for s in range(4):
        torch.testing.assert_close(together[s], family.apply(images, theta[s]), rtol=0, atol=1e-6)


@each_family
def test_image_does_not_depend_on_its_neighbours_in_the_batch(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W)
    theta = draw(family, 6)
    together = family.apply(images, theta)
    for b in range(6):
        alone = family.apply(images[b : b + 1], theta[b : b + 1])[0]
        torch.testing.assert_close(alone, together[b], rtol=0, atol=1e-6)


@each_family
def test_apply_stays_within_zero_and_one(name: str, noise: Noise) -> None:
    family = build_family(name)
    changed = family.apply(noise(8, 3, H, W).round(), draw(family, 8))  # black, white and the six pure colours
    assert changed.dtype == torch.float32
    assert changed.min() >= -1e-6  # the weights of a mean add up to 1 within rounding
    assert changed.max() <= 1 + 1e-6


@each_family
def test_apply_takes_every_input_type_and_leaves_it_alone(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W).half()
    theta = draw(family, 6)
    copies = images.clone(), theta.clone()
    changed = family.apply(images, theta)
    assert changed.dtype == torch.float32
    assert torch.equal(changed, family.apply(images.float(), theta.double()))
    assert torch.equal(images, copies[0]) and torch.equal(theta, copies[1])


@each_family
def test_mixed_precision_changes_no_image(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W)
    theta = draw(family, 6)
    expected = family.apply(images, theta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(family.apply(images, theta), expected)


@each_ranged
def test_ranges_of_zero_give_the_identity(name: str, noise: Noise) -> None:
    family, images = build_family(name, STILL), noise(2, 3, H, W)
    torch.testing.assert_close(family.apply(images, draw(family, 2)), images, rtol=0, atol=ROUNDING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_family
def test_images_on_the_device_equal_those_on_the_cpu(name: str, noise: Noise) -> None:
    family, images = build_family(name), noise(6, 3, H, W)
    theta = torch.stack([family.scale(draw(family, 6), f) for f in (0.3, 1.0)])
    expected = family.apply(images, theta)
    on_device = family.apply(images.cuda(), theta)
    assert on_device.is_cuda
    # A device may round the factors of a convolution to TF32, 11 bits; half a level of 255 is 2e-3.
    torch.testing.assert_close(on_device.cpu(), expected, rtol=0, atol=2e-3)


# -------------------------------------------------------------------------------------------- planar families: the warp


def oracle_map(name: str, theta: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the forward map [3, 3] in float64, written down parameter by parameter."""
    pixels = min(size) / 224

    def turn(degrees: float) -> np.ndarray:
        a = math.radians(degrees)
        return np.array([[math.cos(a), math.sin(a), 0.0], [-math.sin(a), math.cos(a), 0.0], [0.0, 0.0, 1.0]])

    def shift(x: float, y: float) -> np.ndarray:
        return np.array([[1.0, 0.0, x * pixels], [0.0, 1.0, y * pixels], [0.0, 0.0, 1.0]])

    def zoom(log: float) -> np.ndarray:
        return np.diag([math.exp(log), math.exp(log), 1.0])

    if name == "perspective":
        return four_point_map(theta.reshape(4, 2) * pixels, size)
    return {
        "rotation": lambda t: turn(*t),
        "translation": lambda t: shift(*t),
        "se2": lambda t: shift(*t[1:]) @ turn(t[0]),
        "scale": lambda t: zoom(*t),
        "similarity": lambda t: shift(*t[2:]) @ turn(t[0]) @ zoom(t[1]),
    }[name](theta)


def four_point_map(offsets: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the map that moves the corners by `offsets` [4, 2]: eight unknowns, eight equations."""
    rows, moved_to = [], []
    for (x, y), (u, v) in zip(
        ((-1, -1), (1, -1), (1, 1), (-1, 1)), offsets / [size[1] / 2, size[0] / 2], strict=True
    ):  # in units of half the image, where the equations are well conditioned
        u, v = x + u, y + v
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        moved_to += [u, v]
    unit = np.append(np.linalg.solve(np.array(rows), np.array(moved_to)), 1.0).reshape(3, 3)
    half = np.diag([size[1] / 2, size[0] / 2, 1.0])
    return half @ unit @ np.linalg.inv(half)


def extreme_and_drawn(name: str) -> Tensor:
    """Return both ends of the ranges and two draws [4, P]."""
    low, high = ranges(FamilySettings())[name].unbind(dim=1)
    return torch.cat([low[None], high[None], draw(build_family(name), 2)])


@each_size
@each_geometric
def test_maps_equal_the_formula_in_double_precision(name: str, size: tuple[int, int]) -> None:
    theta = extreme_and_drawn(name)
    for row, found in zip(theta, planar(name).maps(theta, size), strict=True):
        expected = oracle_map(name, row.double().numpy(), size)
        expected = torch.from_numpy(expected / expected[2, 2]).float()
        torch.testing.assert_close(found / found[2, 2], expected, rtol=0, atol=2e-5)  # offsets of up to 10 px


@each_fill
@each_geometric
def test_apply_equals_plain_loops(name: str, fill: str, noise: Noise, slow_warp: SlowWarp) -> None:
    images, theta = noise(4, 3, H, W), extreme_and_drawn(name)
    changed = build_family(name, FamilySettings(fill=fill)).apply(images, theta)
    for image, row, result in zip(images, theta, changed, strict=True):
        forward = torch.from_numpy(oracle_map(name, row.double().numpy(), (H, W)))
        torch.testing.assert_close(result.double(), slow_warp(image, forward, fill), rtol=0, atol=1e-4)


@each_fill
@each_geometric
def test_error_at_the_published_size_is_far_below_one_level(name: str, fill: str, noise: Noise) -> None:
    height, width = 224, 320
    images, theta = noise(2, 3, height, width), extreme_and_drawn(name)[1:3]
    changed = build_family(name, FamilySettings(fill=fill)).apply(images, theta)
    rows, columns = np.mgrid[:height, :width]
    points = np.stack([columns - (width - 1) / 2, rows - (height - 1) / 2, np.ones((height, width))])
    mode = {"reflect": "reflect", "zeros": "grid-constant"}[fill]  # SciPy's names of the same extensions
    for image, row, result in zip(images, theta, changed, strict=True):
        backward = np.linalg.inv(oracle_map(name, row.double().numpy(), (height, width)))
        x, y, w = np.einsum("ij,jhw->ihw", backward, points)
        sources = [y / w + (height - 1) / 2, x / w + (width - 1) / 2]
        expected = np.stack([ndimage.map_coordinates(c, sources, order=1, mode=mode) for c in image.double().numpy()])
        error = np.abs(result.double().numpy() - expected)
        assert error.mean() < 1e-4 < 1 / 255  # float32 knows a place 150 px away to 1e-5 px; noise changes by 1 a pixel
        assert error.max() < 1e-3


# --------------------------------------------------------------------------------- planar families: identity to inverse


@each_size
@each_geometric
def test_map_of_no_parameters_is_the_identity(name: str, size: tuple[int, int]) -> None:
    family = planar(name)
    maps = family.maps(torch.zeros(2, len(family.param_names)), size)
    torch.testing.assert_close(maps, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-6)


@each_size
@pytest.mark.parametrize("name", ["rotation", "translation", "scale"])
def test_minus_theta_undoes_the_map(name: str, size: tuple[int, int]) -> None:
    family, theta = planar(name), extreme_and_drawn(name)
    for product in (
        geometry.compose(family.maps(-theta, size), family.maps(theta, size)),
        geometry.compose(family.maps(theta, size), family.maps(-theta, size)),
    ):
        torch.testing.assert_close(product, torch.eye(3).expand(4, 3, 3), rtol=0, atol=1e-6)


@each_size
@each_geometric
def test_every_map_can_be_undone(name: str, size: tuple[int, int]) -> None:
    theta = extreme_and_drawn(name)
    maps = planar(name).maps(theta, size)
    grid = geometry.pixel_centres(size)
    back = geometry.transform_points(geometry.inverse(maps), geometry.transform_points(maps, grid))
    torch.testing.assert_close(back, grid.expand(4, -1, -1), rtol=0, atol=1e-3)  # px; denominators magnify rounding
    assert (torch.linalg.det(maps) > 0.1).all()  # nothing is mirrored or squeezed flat


@pytest.mark.parametrize("name", ["rotation", "translation", "scale"])
def test_minus_theta_undoes_the_image_away_from_the_edge(name: str, wave: Wave) -> None:
    family = build_family(name, FamilySettings(fill="zeros"))
    theta = extreme_and_drawn(name)
    image = wave.image.expand(4, -1, -1, -1)
    there = family.apply(image, theta)
    inside = wave.disc(13.0)
    error = (family.apply(there, -theta) - image).abs()[..., inside]
    # Two resamplings; the second meets waves that a zoom by 0.8 has made 1.25^2 times as steep.
    assert error.max() < (1 + 1.25**2) * wave.warp_error + ROUNDING
    assert (there - image).abs()[:2, ..., inside].amax(dim=(1, 2)).min() > 0.1  # the way there did change the image


@each_geometric
def test_inverse_map_undoes_the_image_away_from_the_edge(name: str, wave: Wave) -> None:
    family, theta = planar(name, FamilySettings(fill="zeros")), extreme_and_drawn(name)
    image = wave.image.expand(4, -1, -1, -1)
    there = family.apply(image, theta)
    back = geometry.warp(there, geometry.inverse(family.maps(theta, wave.size)).unsqueeze(0), "zeros")[0]
    error = (back - image).abs()[..., wave.disc(13.0)]
    assert error.max() < 3 * wave.warp_error + ROUNDING  # two resamplings, the second of waves up to twice as steep


@pytest.mark.parametrize("name", ["se2", "similarity", "perspective"])
def test_minus_theta_does_not_undo_a_family_whose_parts_do_not_commute(name: str) -> None:
    family, theta = planar(name), extreme_and_drawn(name)[2:]
    product = geometry.compose(family.maps(-theta, (H, W)), family.maps(theta, (H, W)))
    assert (product - torch.eye(3)).abs().max() > 0.01


# ----------------------------------------------------------------------------------------- planar families: composition


@each_size
@pytest.mark.parametrize("name", ["rotation", "translation", "scale"])
def test_parameters_of_composed_maps_add_up(name: str, size: tuple[int, int]) -> None:
    family, a, b = planar(name), draw(planar(name), 5, seed=1), draw(planar(name), 5, seed=2)
    composed = geometry.compose(family.maps(a, size), family.maps(b, size))
    torch.testing.assert_close(composed, family.maps(a + b, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["rotation", "translation", "scale"])
def test_images_of_composed_parameters_agree_away_from_the_edge(name: str, wave: Wave) -> None:
    family = build_family(name, FamilySettings(fill="zeros"))
    a, b = (family.scale(draw(family, 4, seed), 0.5) for seed in (1, 2))
    image = wave.image.expand(4, -1, -1, -1)
    in_turn, at_once = family.apply(family.apply(image, a), b), family.apply(image, a + b)
    error = (in_turn - at_once).abs()[..., wave.disc(13.0)]
    assert error.max() < 4 * wave.warp_error + ROUNDING  # three resamplings, of waves up to 1.25 times as steep
    assert (at_once - image).abs().max() > 0.1


@pytest.mark.parametrize("name", ["rotation", "translation", "scale"])
def test_a_third_of_theta_three_times_is_theta(name: str) -> None:
    family, theta = planar(name), draw(planar(name), 5)
    third = family.maps(family.scale(theta, 1 / 3), (H, W))
    thrice = geometry.compose(third, geometry.compose(third, third))
    torch.testing.assert_close(thrice, family.maps(theta, (H, W)), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- planar families: meaning of parameters


@each_geometric
@each_fill
def test_fill_of_the_settings_lies_outside_the_image(name: str, fill: str) -> None:
    family, (_, high) = build_family(name, FamilySettings(fill=fill)), ranges(FamilySettings())[name].unbind(dim=1)
    theta = -high if name == "scale" else high.clone()  # a smaller image leaves a frame
    if name == "similarity":
        theta[1] = -high[1]
    corner = family.apply(torch.ones(1, 3, 56, 80), theta[None])[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((3,), 1.0 if fill == "reflect" else 0.0), rtol=0, atol=1e-6)


def test_rotation_turns_counter_clockwise(noise: Noise) -> None:
    images = noise(2, 3, 9, 9)
    turned = Rotation(FamilySettings()).apply(images, torch.tensor([[90.0], [-90.0]]))
    torch.testing.assert_close(turned[0], torch.rot90(images[0], 1, dims=(-2, -1)), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(turned[1], torch.rot90(images[1], -1, dims=(-2, -1)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["translation", "se2", "similarity"])
def test_shift_goes_right_and_down_by_pixels_of_the_published_crop(name: str, noise: Noise) -> None:
    images, family = noise(1, 3, 28, 56), build_family(name)  # shorter side 224 / 8, so that 8 published pixels are 1
    before = torch.zeros(1, len(family.param_names) - 2)
    shifted = family.apply(images, torch.cat([before, torch.tensor([[16.0, 8.0]])], dim=1))
    torch.testing.assert_close(shifted[..., 1:, 2:], images[..., :-1, :-2], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [(224, 224), (224, 448), (448, 224)])
def test_shift_is_the_published_one_where_the_shorter_side_is_224(size: tuple[int, int]) -> None:
    maps = Translation(FamilySettings()).maps(torch.tensor([10.0, -7.0]), size)
    torch.testing.assert_close(maps, geometry.translation(torch.tensor([10.0, -7.0])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (96, 300), (300, 96)])
def test_shift_scales_with_the_shorter_side(size: tuple[int, int]) -> None:
    pixels = torch.tensor([10.0, -7.0])
    expected = pixels * 96 / 224
    torch.testing.assert_close(published_pixels(pixels, size), expected, rtol=0, atol=1e-6)
    maps = Translation(FamilySettings()).maps(pixels, size)
    torch.testing.assert_close(maps, geometry.translation(expected), rtol=0, atol=1e-6)


def test_se2_is_the_rotation_and_then_the_translation() -> None:
    theta, settings = draw(planar("se2"), 5), FamilySettings()
    turn, shift = Rotation(settings).maps(theta[:, :1], (H, W)), Translation(settings).maps(theta[:, 1:], (H, W))
    torch.testing.assert_close(SE2(settings).maps(theta, (H, W)), geometry.compose(shift, turn), rtol=0, atol=1e-6)


def test_se2_rotates_first_so_that_the_centre_moves_by_the_translation() -> None:
    maps = SE2(FamilySettings()).maps(torch.tensor([40.0, 10.0, -7.0]), (112, 300))
    centre = geometry.transform_points(maps, torch.zeros(1, 2))
    torch.testing.assert_close(centre, torch.tensor([[5.0, -3.5]]), rtol=0, atol=1e-6)


def test_se2_path_is_linear_in_the_parameters_and_not_in_the_motion() -> None:
    family = SE2(FamilySettings())
    theta = torch.tensor([[40.0, 10.0, -7.0]])
    third = family.maps(family.scale(theta, 1 / 3), (224, 300))[0]
    centre = geometry.transform_points(third, torch.zeros(1, 2))
    torch.testing.assert_close(centre, torch.tensor([[10 / 3, -7 / 3]]), rtol=0, atol=1e-5)  # straight, not an arc
    thrice = geometry.compose(third, geometry.compose(third, third))
    assert (thrice - family.maps(theta, (224, 300))[0]).abs().max() > 0.5  # px


def test_positive_log_zoom_magnifies_by_its_exponential() -> None:
    maps = Zoom(FamilySettings()).maps(torch.tensor([[math.log(1.25)], [-math.log(1.25)]]), (H, W))
    corner = geometry.transform_points(maps, torch.tensor([[8.0, -4.0]]))[:, 0]
    torch.testing.assert_close(corner, torch.tensor([[10.0, -5.0], [6.4, -3.2]]), rtol=0, atol=1e-5)


def test_zoom_is_the_same_along_both_axes_of_a_wide_image(wave: Wave) -> None:
    zoomed = build_family("scale").apply(wave.image, torch.tensor([[math.log(1.25)]]))[0, 0]
    expected = wave.at(geometry.pixel_centres(wave.size) / 1.25).view(wave.size)
    assert (zoomed - expected).abs().max() < wave.warp_error + ROUNDING  # nothing comes from outside


def test_similarity_without_zoom_is_se2_and_without_motion_the_zoom() -> None:
    theta, settings = draw(planar("similarity"), 5), FamilySettings()
    family, no_zoom, no_motion = planar("similarity"), theta.clone(), theta.clone()
    no_zoom[:, 1] = 0.0
    no_motion[:, [0, 2, 3]] = 0.0
    motion = SE2(settings).maps(theta[:, [0, 2, 3]], (H, W))
    torch.testing.assert_close(family.maps(no_zoom, (H, W)), motion, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        family.maps(no_motion, (H, W)), Zoom(settings).maps(theta[:, 1:2], (H, W)), rtol=0, atol=1e-6
    )


def test_similarity_keeps_angles_and_the_translation_of_the_centre() -> None:
    maps = Similarity(FamilySettings()).maps(torch.tensor([30.0, 0.2, 10.0, -7.0]), (112, 300))
    centre, right, down = geometry.transform_points(maps, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(centre, torch.tensor([5.0, -3.5]), rtol=0, atol=1e-6)
    assert torch.dot(right - centre, down - centre).item() == pytest.approx(0.0, abs=1e-5)
    for arm in (right - centre, down - centre):
        assert arm.norm().item() == pytest.approx(math.exp(0.2), abs=1e-5)


@each_size
def test_corners_land_where_the_perspective_says(size: tuple[int, int]) -> None:
    family, theta = planar("perspective"), extreme_and_drawn("perspective")
    corners = geometry.corners(size)
    landed = geometry.transform_points(family.maps(theta, size), corners)
    offsets = theta.view(4, 4, 2) * min(size) / 224
    torch.testing.assert_close(landed, corners + offsets, rtol=0, atol=1e-4)  # px


@each_size
@pytest.mark.parametrize("fraction", [0.25, 1 / 3, 0.5, 2 / 3])
def test_part_of_a_perspective_moves_the_corners_by_that_part(size: tuple[int, int], fraction: float) -> None:
    family, theta = planar("perspective"), draw(planar("perspective"), 5)
    corners = geometry.corners(size)
    whole, part = (
        geometry.transform_points(family.maps(family.scale(theta, f), size), corners) for f in (1.0, fraction)
    )
    torch.testing.assert_close(part - corners, fraction * (whole - corners), rtol=0, atol=1e-4)  # px


def test_each_corner_parameter_moves_its_own_corner_only() -> None:
    family, size = planar("perspective"), (112, 160)
    landed = geometry.transform_points(family.maps(8.0 * torch.eye(8), size), geometry.corners(size))
    moves = (landed - geometry.corners(size)).flatten(1)  # [8, 4 * 2]
    torch.testing.assert_close(moves, 4.0 * torch.eye(8), rtol=0, atol=1e-4)  # half of 224: 8 published px are 4


def test_content_of_the_top_left_corner_follows_it() -> None:
    image = torch.zeros(1, 3, 56, 112)
    image[..., :8, :8] = 1.0
    theta = torch.zeros(1, 8)
    theta[0, :2] = 20.0  # 5 pixels right and down
    moved = build_family("perspective", FamilySettings(fill="zeros")).apply(image, theta)[0, 0]
    assert moved[:4, :4].max() == 0.0  # outside
    assert moved[7:10, 7:10].min() > 0.99
    torch.testing.assert_close(moved[-4:, -4:], image[0, 0, -4:, -4:], rtol=0, atol=ROUNDING)


def test_perspective_of_equal_corner_shifts_is_the_translation() -> None:
    theta = torch.tensor([[7.0, -4.0]])
    maps = planar("perspective").maps(theta.repeat(1, 4), (H, W))
    torch.testing.assert_close(maps, planar("translation").maps(theta, (H, W)), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- registry


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        build_family("se3")
    assert "'se3'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_unknown_fill_is_refused(noise: Noise) -> None:
    family = build_family("rotation", FamilySettings(fill="border"))
    with pytest.raises(ValueError, match="reflect, zeros; got 'border'"):
        family.apply(noise(1, 3, H, W), torch.zeros(1, 1))


def test_registered_family_is_built_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[FamilySettings] = []

    def build(settings: FamilySettings) -> TransformFamily:
        received.append(settings)
        return Rotation(settings)

    monkeypatch.setitem(FAMILIES, "mine", build)
    assert isinstance(build_family("mine", NARROW), Rotation)
    assert received == [NARROW]
