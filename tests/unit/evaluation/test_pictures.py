"""Pictures: colours that mean what they say, and figures that hold every image in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2_equi.evaluation.pictures import (
    MAX_PICTURE_SIDE,
    pca_colors,
    pca_figure,
    probe_figure,
    reconstruction_figure,
)
from dinov2_equi.evaluation.transform_regression import ProbeResult


def tokens(n: int = 3, N: int = 6, D: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, N, D, generator=generator) * torch.linspace(1, 9, D)


def shown(figure: Figure) -> dict[tuple[int, int], np.ndarray]:
    """Return the pictures of a figure by their (row, column), counted from the upper left."""
    places = {axes: (-round(axes.get_position().y0, 6), round(axes.get_position().x0, 6)) for axes in figure.axes}
    rows, columns = (sorted({place[i] for place in places.values()}) for i in (0, 1))
    return {
        (rows.index(row), columns.index(column)): np.asarray(axes.images[0].get_array())
        for axes, (row, column) in places.items()
    }


# ---------------------------------------------------------------------------------------------------------------- PCA


def test_colours_are_the_first_three_components_of_all_images_together() -> None:
    features = tokens()
    colors = pca_colors(features, (2, 3))
    assert colors.shape == (3, 2, 3, 3)
    assert colors.dtype == torch.float32
    components = PCA(3).fit_transform(features.reshape(18, 8).double().numpy())
    for c in range(3):
        got = colors[..., c].flatten().double().numpy()
        inside = (got > 0) & (got < 1)  # the ends are clipped
        correlation = np.corrcoef(got[inside], components[inside, c])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-6)  # float32 colours


def test_patches_keep_their_place_on_a_grid_that_is_not_square() -> None:
    features = torch.zeros(1, 6, 4)
    features[0, 4] = torch.tensor([1.0, 2.0, 3.0, 9.0])  # row 1, column 1 of (2, 3)
    colors = pca_colors(features, (2, 3))
    odd = (colors - colors[0, 0, 0]).abs().sum(dim=-1) > 0.5
    assert odd.nonzero().tolist() == [[0, 1, 1]]


def test_the_sign_of_the_components_does_not_flip_with_the_order_of_the_images() -> None:
    features = tokens(seed=1)
    # 1e-5: float32 colours from sums in another order.
    torch.testing.assert_close(
        pca_colors(features.flip(0), (2, 3)).flip(0), pca_colors(features, (2, 3)), atol=1e-5, rtol=0
    )


def test_a_single_outlier_does_not_drown_all_other_patches() -> None:
    features = tokens(n=10, N=36, seed=2)
    features[0, 0] = 1e4
    assert pca_colors(features, (6, 6))[..., 1].std() > 0.1


def test_tokens_with_fewer_than_three_directions_give_grey_and_no_nan() -> None:
    assert torch.equal(pca_colors(torch.ones(1, 4, 5), (2, 2)), torch.full((1, 2, 2, 3), 0.5))
    narrow = pca_colors(tokens(n=1, N=4, D=2), (2, 2))
    assert narrow.isfinite().all() and torch.equal(narrow[..., 2], torch.full((1, 2, 2), 0.5))


def test_a_grid_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 patch tokens.*\(2, 2\)"):
        pca_colors(tokens(), (2, 2))


def test_pca_figure_has_photographs_above_each_row_of_colours() -> None:
    images = torch.rand(3, 3, 8, 12)
    before, after = torch.rand(3, 2, 3, 3), torch.rand(3, 2, 3, 3)
    pictures = shown(pca_figure(images, {"before": before, "after": after}))
    assert len(pictures) == 9
    for i in range(3):
        np.testing.assert_array_equal(pictures[0, i], images[i].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(pictures[1, i], before[i].numpy())
        np.testing.assert_array_equal(pictures[2, i], after[i].numpy())


def test_pca_figure_refuses_a_row_that_lacks_images() -> None:
    with pytest.raises(ValueError, match="'after'"):
        pca_figure(torch.rand(3, 3, 8, 8), {"after": torch.rand(2, 2, 2, 3)})


# ----------------------------------------------------------------------------------------------------- reconstruction


def reconstruction_inputs(S: int = 2, B: int = 3, H: int = 8, W: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    view_1, view_2 = torch.rand(2, B, 3, H, W, generator=generator)
    targets, rebuilt = torch.rand(2, S, B, 3, H, W, generator=generator)
    return view_1, view_2, targets, rebuilt


def test_each_row_holds_views_then_targets_beside_their_reconstructions() -> None:
    view_1, view_2, targets, rebuilt = reconstruction_inputs()
    figure = reconstruction_figure(view_1, view_2, targets, rebuilt)
    pictures = shown(figure)
    assert len(pictures) == 3 * 6
    for row in range(3):
        expected = [view_1[row], view_2[row], targets[0, row], rebuilt[0, row], targets[1, row], rebuilt[1, row]]
        for column, image in enumerate(expected):
            np.testing.assert_array_equal(pictures[row, column], image.permute(1, 2, 0).numpy())
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["view 1", "view 2", "target 1", "rebuilt 1", "target 2", "rebuilt 2"]


@pytest.mark.parametrize(("S", "B", "H", "W"), [(1, 1, 8, 8), (2, 7, 8, 16), (3, 2, 16, 8)])
def test_pictures_keep_their_shape_whatever_their_number(S: int, B: int, H: int, W: int) -> None:
    figure = reconstruction_figure(*reconstruction_inputs(S, B, H, W), max_images=4)
    assert len(figure.axes) == min(B, 4) * (2 + 2 * S)
    for axes in figure.axes:
        box = axes.get_position()
        aspect = box.height * figure.get_figheight() / (box.width * figure.get_figwidth())
        assert aspect == pytest.approx(H / W)
        assert min(box.x0, box.y0) > -1e-9 and max(box.x1, box.y1) < 1 + 1e-9


def test_reconstructions_outside_0_to_1_and_in_half_precision_are_shown_clipped() -> None:
    view_1, view_2, targets, rebuilt = reconstruction_inputs(1, 1)
    pictures = shown(reconstruction_figure(view_1, view_2, targets, (rebuilt * 4 - 2).bfloat16().requires_grad_()))
    assert pictures[0, 3].min() == 0 and pictures[0, 3].max() == 1


def test_large_pictures_are_made_smaller_and_a_coarser_reconstruction_fits_beside() -> None:
    side = MAX_PICTURE_SIDE * 2
    view_1, view_2, targets, _ = reconstruction_inputs(1, 1, side, side // 2)
    pictures = shown(reconstruction_figure(view_1, view_2, targets, torch.rand(1, 1, 3, 20, 10)))
    assert pictures[0, 0].shape == (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE // 2, 3)
    assert pictures[0, 3].shape == (20, 10, 3)


def test_numbers_of_images_that_differ_are_refused() -> None:
    view_1, view_2, targets, rebuilt = reconstruction_inputs()
    with pytest.raises(ValueError, match="B >= 1"):
        reconstruction_figure(view_1, view_2[:2], targets, rebuilt)
    with pytest.raises(ValueError, match="B >= 1"):
        reconstruction_figure(view_1, view_2, targets, rebuilt[:1])


# -------------------------------------------------------------------------------------------------------------- probe


def result(scale: float) -> ProbeResult:
    targets = torch.linspace(-45, 45, 20)[:, None]
    return ProbeResult(0.5, (0.5,), 0.5, 10, 20, 1, targets * scale, targets)


def test_probe_figure_shows_every_pair_before_and_after() -> None:
    figure = probe_figure(result(0.1), result(0.9))
    assert len(figure.axes) == 2
    for axes, scale in zip(figure.axes, (0.1, 0.9), strict=True):
        offsets = np.asarray(axes.collections[0].get_offsets())
        np.testing.assert_allclose(offsets[:, 1], offsets[:, 0] * scale, rtol=1e-5)


def test_probe_figure_without_a_measurement_before_training_and_with_wild_answers() -> None:
    figure = probe_figure(None, result(100.0))
    assert len(figure.axes) == 1
    low, high = figure.axes[0].get_ylim()
    heights = np.asarray(figure.axes[0].collections[0].get_offsets())[:, 1]
    assert low <= heights.min() and heights.max() <= high  # drawn at the edge rather than out of sight
