"""Planar maps and the warp: identity, inverse, composition and direction, against plain loops, on non-square images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_equi.equi import geometry

if TYPE_CHECKING:
    from tests.unit.equi.conftest import Wave

Noise = Callable[..., Tensor]
SlowWarp = Callable[[Tensor, Tensor, str], Tensor]

H, W = 6, 10
ROUNDING = 1e-5  # float32 coordinates of some tens of pixels are known to about 1e-6 px; values lie in [0, 1]


def rotation(angle: float) -> Tensor:
    return geometry.rotation(torch.tensor(angle))


def translation(x: float, y: float) -> Tensor:
    return geometry.translation(torch.tensor([x, y]))


def stretch(x: float, y: float) -> Tensor:
    return torch.diag(torch.tensor([x, y, 1.0]))


def moved(maps: Tensor, x: float, y: float) -> list[float]:
    return geometry.transform_points(maps, torch.tensor([[x, y]]))[0].tolist()


def warp_one(images: Tensor, maps: Tensor, fill: str = "reflect") -> Tensor:
    """Warp all images [B, C, H, W] by one map [3, 3]."""
    return geometry.warp(images, maps.expand(1, len(images), 3, 3), fill)[0]


MAPS = {
    "identity": torch.eye(3),
    "rotation": rotation(30.0),
    "large rotation": rotation(-170.0),
    "translation": translation(1.3, -2.6),
    "translation by several images": translation(-33.7, 21.2),
    "rotation then translation": geometry.compose(translation(2.5, 0.75), rotation(-41.0)),
    "anisotropic stretch": stretch(1.7, 0.6),
    "shear": torch.tensor([[1.0, 0.4, 0.0], [-0.1, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "mirror": stretch(-1.0, 1.0),
    "perspective": torch.tensor([[1.0, 0.1, 0.5], [0.0, 1.1, -0.2], [0.02, 0.03, 1.0]]),
}
each_map = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS.keys())
each_fill = pytest.mark.parametrize("fill", geometry.FILLS)


# ----------------------------------------------------------------------------------------------------------------- maps


def test_pixel_centres_run_row_by_row_around_the_image_centre() -> None:
    expected = [[c + 0.5 - 5 / 2, r + 0.5 - 3 / 2] for r in range(3) for c in range(5)]
    assert geometry.pixel_centres((3, 5)).tolist() == expected


def test_rotation_by_a_positive_angle_takes_right_to_up() -> None:
    # y points down, so "up" is negative; float32 sine and cosine of 90 degrees are exact to 1e-7.
    assert moved(rotation(90.0), 1.0, 0.0) == pytest.approx([0.0, -1.0], abs=1e-6)
    assert moved(rotation(90.0), 0.0, -1.0) == pytest.approx([-1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("angle", [-45.0, -7.5, 0.0, 30.0, 123.0])
def test_rotation_equals_its_formula(angle: float) -> None:
    x, y, a = 3.0, -1.5, math.radians(angle)
    expected = [x * math.cos(a) + y * math.sin(a), -x * math.sin(a) + y * math.cos(a)]
    assert moved(rotation(angle), x, y) == pytest.approx(expected, abs=1e-6)


def test_translation_adds_x_to_the_right_and_y_down() -> None:
    assert moved(translation(3.0, -2.0), 1.0, 1.0) == [4.0, -1.0]


def test_maps_of_zero_parameters_are_the_identity_matrix() -> None:
    assert torch.equal(rotation(0.0), torch.eye(3))
    assert torch.equal(translation(0.0, 0.0), torch.eye(3))


def test_maps_keep_the_leading_axes_of_their_parameters() -> None:
    angles, offsets = torch.arange(8.0).view(4, 2) * 11, torch.arange(16.0).view(4, 2, 2)
    rotations, translations = geometry.rotation(angles), geometry.translation(offsets)
    assert rotations.shape == translations.shape == (4, 2, 3, 3)
    assert torch.equal(rotations[3, 1], geometry.rotation(angles[3, 1]))
    assert torch.equal(translations[3, 1], geometry.translation(offsets[3, 1]))


def test_scaling_multiplies_distances_from_the_centre() -> None:
    assert moved(geometry.scaling(torch.tensor(1.5)), 4.0, -2.0) == [6.0, -3.0]
    factors = torch.arange(1.0, 9.0).view(4, 2)
    assert torch.equal(geometry.scaling(factors)[3, 1], stretch(8.0, 8.0))


def test_scalings_multiply_and_their_reciprocal_undoes_them() -> None:
    double, half = geometry.scaling(torch.tensor(2.0)), geometry.scaling(torch.tensor(0.5))
    assert torch.equal(geometry.compose(double, double), geometry.scaling(torch.tensor(4.0)))
    assert torch.equal(geometry.inverse(double), half)


def test_a_magnified_spot_moves_away_from_the_centre_along_both_axes() -> None:
    images = torch.zeros(1, 1, 9, 15)
    images[0, 0, 4 - 1, 7 + 2] = 1.0  # centre is row 4, column 7
    warped = warp_one(images, geometry.scaling(torch.tensor(2.0)), "zeros")[0, 0]
    assert warped[4 - 2, 7 + 4].item() == pytest.approx(1.0, abs=ROUNDING)
    assert warped.sum().item() == pytest.approx(4.0, abs=ROUNDING)  # twice as wide, twice as high


def test_corners_run_clockwise_from_the_top_left_at_the_outer_edges() -> None:
    assert geometry.corners((H, W)).tolist() == [[-5.0, -3.0], [5.0, -3.0], [5.0, 3.0], [-5.0, 3.0]]


QUADS = {
    "the image itself": [[-5.0, -3.0], [5.0, -3.0], [5.0, 3.0], [-5.0, 3.0]],
    "a trapezium": [[-4.0, -3.0], [4.0, -3.0], [5.0, 3.0], [-5.0, 3.0]],
    "a parallelogram": [[-4.0, -3.0], [6.0, -2.0], [4.0, 4.0], [-6.0, 3.0]],
    "any convex shape": [[-4.5, -3.5], [5.5, -2.0], [4.0, 3.5], [-6.0, 2.0]],
    "upside down": [[5.0, 3.0], [-5.0, 3.0], [-5.0, -3.0], [5.0, -3.0]],
}
each_quad = pytest.mark.parametrize("quad", QUADS.values(), ids=QUADS.keys())


def homography_by_linear_system(quad: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Return the map [3, 3] in float64, its eight unknowns from the eight equations of the four corners."""
    rows, moved_to = [], []
    for (x, y), (u, v) in zip(geometry.corners(size).tolist(), quad, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        moved_to += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(moved_to)), 1.0).reshape(3, 3)


@each_quad
def test_homography_takes_the_corners_to_the_four_points(quad: list[list[float]]) -> None:
    maps = geometry.homography(torch.tensor(quad), (H, W))
    landed = geometry.transform_points(maps, geometry.corners((H, W)))
    torch.testing.assert_close(landed, torch.tensor(quad), rtol=0, atol=ROUNDING)


@each_quad
def test_homography_equals_the_solution_of_the_linear_system(quad: list[list[float]]) -> None:
    maps = geometry.homography(torch.tensor(quad, dtype=torch.float64), (H, W)).numpy()
    # A homography is known up to a factor; the rounding is that of float64.
    assert np.allclose(maps / maps[2, 2], homography_by_linear_system(quad, (H, W)), rtol=0, atol=1e-12)


def test_homography_of_the_corners_is_the_identity_matrix() -> None:
    for size in ((H, W), (W, H), (224, 224), (37, 91)):
        maps = geometry.homography(geometry.corners(size), size)
        torch.testing.assert_close(maps, torch.eye(3), rtol=0, atol=1e-6)


def test_homography_of_a_moved_image_is_the_planar_map_that_moved_it() -> None:
    for maps in (MAPS["rotation"], MAPS["translation"], MAPS["anisotropic stretch"], MAPS["perspective"]):
        quad = geometry.transform_points(maps, geometry.corners((H, W)))
        found = geometry.homography(quad, (H, W))
        torch.testing.assert_close(found / found[2, 2], maps, rtol=0, atol=ROUNDING)


def test_homography_keeps_the_leading_axes_of_its_points() -> None:
    quads = torch.tensor(list(QUADS.values())[:4]).unflatten(0, (2, 2))  # [2, 2, 4, 2]
    maps = geometry.homography(quads, (H, W))
    assert maps.shape == (2, 2, 3, 3)
    assert torch.equal(maps[1, 0], geometry.homography(quads[1, 0], (H, W)))


def test_compose_applies_its_second_argument_first() -> None:
    turn, shift = rotation(90.0), translation(5.0, 0.0)
    # Turn (1, 0) to (0, -1), then shift; or shift to (6, 0), then turn.
    assert moved(geometry.compose(shift, turn), 1.0, 0.0) == pytest.approx([5.0, -1.0], abs=1e-5)
    assert moved(geometry.compose(turn, shift), 1.0, 0.0) == pytest.approx([0.0, -6.0], abs=1e-5)


def test_compose_is_associative() -> None:
    a, b, c = rotation(20.0), translation(3.0, -4.0), MAPS["shear"]
    left, right = geometry.compose(geometry.compose(a, b), c), geometry.compose(a, geometry.compose(b, c))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)  # float32 sums of numbers below 10


def test_composed_rotations_and_translations_add_up() -> None:
    turned = geometry.compose(rotation(20.0), rotation(-55.0))
    shifted = geometry.compose(translation(1.0, 2.0), translation(0.5, -4.0))
    torch.testing.assert_close(turned, rotation(-35.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted, translation(1.5, -2.0), rtol=0, atol=1e-6)


@each_map
def test_inverse_undoes_a_map_from_both_sides(maps: Tensor) -> None:
    inverse = geometry.inverse(maps)
    for product in (geometry.compose(maps, inverse), geometry.compose(inverse, maps)):
        # Offsets of up to 40 px cancel: 1e-7 relative of that.
        torch.testing.assert_close(product, torch.eye(3), rtol=0, atol=2e-5)


def test_inverse_of_a_motion_is_the_motion_with_the_opposite_sign() -> None:
    torch.testing.assert_close(geometry.inverse(rotation(33.0)), rotation(-33.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(geometry.inverse(translation(2.0, -7.0)), translation(-2.0, 7.0), rtol=0, atol=1e-6)


def test_transform_points_divides_by_the_homogeneous_coordinate() -> None:
    perspective = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]])
    assert moved(perspective, 2.0, 6.0) == [1.0, 3.0]


def test_transform_points_broadcasts_one_set_of_points_over_all_maps() -> None:
    maps = torch.stack(list(MAPS.values())).unflatten(0, (2, 5))  # [2, 5, 3, 3]
    points = geometry.pixel_centres((H, W))
    together = geometry.transform_points(maps, points)
    assert together.shape == (2, 5, H * W, 2)
    torch.testing.assert_close(together[1, 2], geometry.transform_points(maps[1, 2], points), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- warp


@each_fill
@each_map
def test_warp_equals_plain_loops(maps: Tensor, fill: str, noise: Noise, slow_warp: SlowWarp) -> None:
    images = noise(2, 2, 5, 8)
    warped = warp_one(images, maps, fill)
    for image, result in zip(images, warped, strict=True):
        # The perspective's denominator magnifies the coordinate rounding about tenfold.
        torch.testing.assert_close(result.double(), slow_warp(image, maps, fill), rtol=0, atol=1e-4)


@each_fill
@pytest.mark.parametrize("size", [(32, 64), (8, 16)])
def test_identity_returns_every_bit_where_sides_are_powers_of_two(
    size: tuple[int, int], fill: str, noise: Noise
) -> None:
    images = noise(2, 3, *size)
    assert torch.equal(warp_one(images, torch.eye(3), fill), images)  # the coordinates are exact in binary


@each_fill
@pytest.mark.parametrize("size", [(98, 224), (30, 52), (1, 7)])
def test_identity_returns_the_image_up_to_rounding(size: tuple[int, int], fill: str, noise: Noise) -> None:
    images = noise(2, 3, *size)
    # A coordinate near +-1 is known to 2**-24, times half of 224 px, times a contrast of up to 1.
    torch.testing.assert_close(warp_one(images, torch.eye(3), fill), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("quarters", [-1, 1, 2, 3])
def test_quarter_turns_of_a_square_image_go_counter_clockwise(quarters: int, noise: Noise) -> None:
    images = noise(2, 3, 7, 7)
    expected = torch.rot90(images, quarters, dims=(-2, -1))
    torch.testing.assert_close(warp_one(images, rotation(90.0 * quarters)), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("fill", geometry.FILLS)
def test_quarter_turn_of_a_wide_image_turns_its_central_square(fill: str, noise: Noise) -> None:
    images = noise(2, 3, H, W)
    margin = (W - H) // 2
    square = images[..., margin : W - margin]
    warped = warp_one(images, rotation(90.0), fill)
    expected = torch.rot90(square, 1, dims=(-2, -1))
    torch.testing.assert_close(warped[..., margin : W - margin], expected, rtol=0, atol=ROUNDING)


def test_half_turn_of_a_wide_image_reverses_both_axes(noise: Noise) -> None:
    images = noise(1, 3, H, W)
    torch.testing.assert_close(warp_one(images, rotation(180.0)), images.flip(-1, -2), rtol=0, atol=ROUNDING)


def test_a_spot_right_of_the_centre_moves_up_on_a_wide_image() -> None:
    images = torch.zeros(1, 1, 9, 15)
    images[0, 0, 4, 7 + 3] = 1.0  # centre is row 4, column 7
    warped = warp_one(images, rotation(90.0), "zeros")[0, 0]
    assert warped[4 - 3, 7].item() == pytest.approx(1.0, abs=ROUNDING)
    assert warped.sum().item() == pytest.approx(1.0, abs=ROUNDING)


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, 2), (-4, 1), (2, -3)])
def test_translation_by_whole_pixels_equals_slicing(x: int, y: int, noise: Noise) -> None:
    images = noise(2, 3, H, W)
    warped = warp_one(images, translation(float(x), float(y)), "zeros")
    expected = torch.zeros_like(images)
    rows, columns = slice(max(y, 0), H + min(y, 0)), slice(max(x, 0), W + min(x, 0))
    from_rows, from_columns = slice(max(-y, 0), H + min(-y, 0)), slice(max(-x, 0), W + min(-x, 0))
    expected[..., rows, columns] = images[..., from_rows, from_columns]
    torch.testing.assert_close(warped, expected, rtol=0, atol=ROUNDING)


def test_positive_x_moves_the_content_right_and_positive_y_down(noise: Noise) -> None:
    images = noise(1, 1, H, W)
    right, down = warp_one(images, translation(1.0, 0.0)), warp_one(images, translation(0.0, 1.0))
    torch.testing.assert_close(right[..., 1:], images[..., :-1], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(down[..., 1:, :], images[..., :-1, :], rtol=0, atol=ROUNDING)


def test_half_pixel_translation_averages_neighbours(noise: Noise) -> None:
    images = noise(1, 2, H, W)
    warped = warp_one(images, translation(0.5, 0.0))
    expected = (images[..., 1:] + images[..., :-1]) / 2
    torch.testing.assert_close(warped[..., 1:], expected, rtol=0, atol=ROUNDING)


def test_reflect_mirrors_the_image_at_its_edge(noise: Noise) -> None:
    images = noise(1, 2, H, W)
    warped = warp_one(images, translation(3.0, 0.0))
    torch.testing.assert_close(warped[..., :3], images[..., :3].flip(-1), rtol=0, atol=ROUNDING)


def test_reflect_leaves_no_corner_in_a_constant_image() -> None:
    images = torch.full((1, 3, H, W), 0.7)
    torch.testing.assert_close(warp_one(images, rotation(45.0)), images, rtol=0, atol=1e-6)


def test_zeros_leave_black_corners_and_keep_the_middle() -> None:
    warped = warp_one(torch.ones(1, 1, 20, 30), rotation(45.0), "zeros")[0, 0]
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert warped[row, column].item() == 0.0
    torch.testing.assert_close(warped[8:12, 10:20], torch.ones(4, 10), rtol=0, atol=1e-6)


@each_fill
def test_values_stay_between_darkest_and_brightest_pixel(fill: str, noise: Noise) -> None:
    warped = warp_one(noise(2, 3, 17, 29), geometry.compose(translation(2.3, 1.1), rotation(37.0)), fill)
    assert warped.min() >= -1e-6  # the four weights add up to 1 within rounding
    assert warped.max() <= 1 + 1e-6


# ------------------------------------------------------------------------------------- inverse and composition of warps

motions = pytest.mark.parametrize(("angle", "x", "y"), [(30.0, 0.0, 0.0), (-45.0, 2.5, -1.25), (8.0, -3.3, 2.9)])


@motions
def test_warped_wave_is_the_wave_at_the_source_points(angle: float, x: float, y: float, wave: Wave) -> None:
    motion = geometry.compose(translation(x, y), rotation(angle))
    centres = geometry.pixel_centres(wave.size)
    expected = wave.at(geometry.transform_points(geometry.inverse(motion), centres)).view(wave.size)
    error = (warp_one(wave.image, motion)[0, 0] - expected).abs()[wave.disc(14.0)]
    assert error.max() < wave.warp_error + ROUNDING


@motions
def test_inverse_warp_returns_the_interior(angle: float, x: float, y: float, wave: Wave) -> None:
    image, motion = wave.image, geometry.compose(translation(x, y), rotation(angle))
    there = warp_one(image, motion, "zeros")
    back = warp_one(there, geometry.inverse(motion), "zeros")
    error = (back - image)[0, 0].abs()[wave.disc(14.0)]
    assert error.max() < 2 * wave.warp_error + ROUNDING
    assert (there - image)[0, 0].abs()[wave.disc(14.0)].max() > 0.2  # the way there did change the image


@motions
def test_warp_by_a_composed_map_equals_two_warps_in_the_interior(angle: float, x: float, y: float, wave: Wave) -> None:
    turn, shift = rotation(angle), translation(x, y)
    at_once = warp_one(wave.image, geometry.compose(shift, turn), "zeros")
    in_turn = warp_one(warp_one(wave.image, turn, "zeros"), shift, "zeros")
    error = (at_once - in_turn)[0, 0].abs()[wave.disc(14.0)]
    assert error.max() < 3 * wave.warp_error + ROUNDING  # one resampling on the left, two on the right


def test_whole_pixel_shift_and_back_is_exact_in_the_interior(noise: Noise) -> None:
    images = noise(1, 3, 12, 20)
    back = warp_one(warp_one(images, translation(3.0, -2.0), "zeros"), translation(-3.0, 2.0), "zeros")
    torch.testing.assert_close(back[..., 2:, :-3], images[..., 2:, :-3], rtol=0, atol=ROUNDING)


# -------------------------------------------------------------------------------------------------- batches and numbers


def batch_of_maps(S: int, B: int) -> Tensor:
    angles = torch.linspace(-60.0, 75.0, S * B).view(S, B)
    offsets = torch.linspace(-3.0, 4.0, S * B * 2).view(S, B, 2)
    return geometry.compose(geometry.translation(offsets), geometry.rotation(angles))


@each_fill
def test_warp_of_many_maps_equals_one_call_a_map_bit_for_bit(fill: str, noise: Noise) -> None:
    images, maps = noise(3, 3, 13, 22), batch_of_maps(4, 3)
    together = geometry.warp(images, maps, fill)
    assert together.shape == (4, 3, 3, 13, 22)
    for s in range(4):
        assert torch.equal(together[s], geometry.warp(images, maps[s : s + 1], fill)[0])


@each_fill
def test_affine_maps_beside_a_perspective_one_change_no_bit(fill: str, noise: Noise) -> None:
    images = noise(2, 3, 13, 22)  # a batch of affine maps alone is spared the division
    affine = torch.stack([MAPS["rotation then translation"], MAPS["shear"]]).unsqueeze(0)  # [1, 2, 3, 3]
    both = torch.cat([affine, MAPS["perspective"].expand(1, 2, 3, 3)])
    assert torch.equal(geometry.warp(images, both, fill)[0], geometry.warp(images, affine, fill)[0])


@each_fill
@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_map_times_a_number_is_the_same_map(factor: float, fill: str, noise: Noise) -> None:
    images = noise(1, 3, 13, 22)
    for maps in (MAPS["rotation then translation"], MAPS["perspective"]):
        expected = warp_one(images, maps, fill)
        # The perspective's denominator magnifies the coordinate rounding about tenfold.
        torch.testing.assert_close(warp_one(images, factor * maps, fill), expected, rtol=0, atol=1e-4)


def test_warp_of_an_image_does_not_depend_on_its_neighbours_in_the_batch(noise: Noise) -> None:
    images, maps = noise(3, 3, 13, 22), batch_of_maps(4, 3)
    together = geometry.warp(images, maps)
    for b in range(3):
        assert torch.equal(together[:, b], geometry.warp(images[b : b + 1], maps[:, b : b + 1])[:, 0])


def test_warp_resamples_once_for_all_maps(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    original = F.grid_sample

    def counting(source: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(source)
        return original(source, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "grid_sample", counting)
    geometry.warp(noise(3, 3, 13, 22), batch_of_maps(4, 3))
    assert [len(source) for source in calls] == [3]  # one call, and no copy of an image for each map


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_warp_computes_in_float32_whatever_comes_in(dtype: torch.dtype, noise: Noise) -> None:
    images, maps = noise(1, 3, 13, 22).to(dtype), batch_of_maps(2, 1)
    warped = geometry.warp(images, maps)
    assert warped.dtype == torch.float32
    assert torch.equal(warped, geometry.warp(images.float(), maps))


def test_warp_leaves_its_input_alone(noise: Noise) -> None:
    images, maps = noise(2, 3, H, W), batch_of_maps(2, 2)
    copies = images.clone(), maps.clone()
    geometry.warp(images, maps)
    assert torch.equal(images, copies[0])
    assert torch.equal(maps, copies[1])


def test_mixed_precision_moves_no_pixel(noise: Noise) -> None:
    # bf16 keeps 8 bits: a point 100 px from the centre would be known to half a pixel only.
    images, angles, offsets = noise(1, 3, 64, 96), torch.tensor([[30.0]]), torch.tensor([[[5.3, -2.1]]])

    def views() -> Tensor:
        return geometry.warp(images, geometry.compose(geometry.translation(offsets), geometry.rotation(angles)))

    expected = views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = views()
    assert torch.equal(mixed, expected)


# --------------------------------------------------------------------------------------------------------------- errors


def test_unknown_fill_lists_the_known_ones(noise: Noise) -> None:
    with pytest.raises(ValueError, match="reflect, zeros; got 'border'"):
        geometry.warp(noise(1, 3, H, W), torch.eye(3).expand(1, 1, 3, 3), "border")


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (2, 3, 3), (2, 2, 2, 3)])
def test_maps_that_do_not_fit_the_images_are_refused_with_both_sizes(shape: tuple[int, ...], noise: Noise) -> None:
    with pytest.raises(ValueError) as caught:
        geometry.warp(noise(2, 3, H, W), torch.zeros(shape))
    assert "[S, 2, 3, 3] for 2 images" in str(caught.value)
    assert str(list(shape)) in str(caught.value)
