"""A picture of found homographies: true and predicted quadrilaterals over the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dinov2_equi.data.datasets.channels import channels_as_rgb
from dinov2_equi.equi import geometry
from dinov2_equi.evaluation.figures import GREEN, INK, ORANGE
from dinov2_equi.evaluation.homography_pairs import Pair, corner_errors

_CELL_INCHES = 1.9
_TITLES = ("image: true and found", "first patch", "second patch", "second, put back")


def homography_figure(pairs: Sequence[Pair], predicted: Tensor) -> Figure:
    """Return a figure with one row a pair: quadrilaterals over the image, the two patches, and the second put back.

    The quadrilateral that was cut out is green, the one that was found orange, the first patch grey. Put back with the
    found homography, the second patch looks like the image around the first where the answer is right.

    Args:
        pairs: at least one.
        predicted: [n, 4, 2] shifts that were found, pixels.

    Raises:
        ValueError: for no pair, or another number of answers.
    """
    if not pairs or len(pairs) != len(predicted):
        raise ValueError(f"expected at least one pair and an answer for each, got {len(pairs)} and {len(predicted)}")
    figure = Figure(figsize=(4 * _CELL_INCHES, len(pairs) * _CELL_INCHES + 0.35), layout="constrained")
    axes = figure.subplots(len(pairs), 4, squeeze=False)
    for row, (pair, found) in enumerate(zip(pairs, predicted, strict=True)):
        pictures = (pair.window, pair.first, pair.second, put_back(pair, found))
        for column, picture in enumerate(pictures):
            _show(axes[row, column], picture, _TITLES[column] if row == 0 else "")
        error = float(corner_errors(found[None], pair.shifts[None]))
        axes[row, 0].set_ylabel(f"{error:.1f} px", color=INK)
        middle, corners = pair.window.shape[1] / 2, geometry.corners((pair.first.shape[1],) * 2)
        for quad, colour in ((corners, "#ffffff90"), (corners + pair.shifts, GREEN), (corners + found, ORANGE)):
            closed = torch.cat([quad, quad[:1]]) + middle - 0.5  # pixel centres are whole numbers to matplotlib
            axes[row, 0].plot(closed[:, 0], closed[:, 1], color=colour, linewidth=1.8)
    return figure


def put_back(pair: Pair, shifts: Tensor) -> Tensor:
    """Return the second patch where the homography of `shifts` [4, 2] puts it, over the darkened image: [C, W, W].

    Shifts whose corners make no convex quadrilateral, as a head may answer, leave the dark image.
    """
    size, side = tuple(pair.first.shape[1:]), pair.window.shape[1]
    dark = pair.window * 0.35
    quad = geometry.corners((size[0], size[1])).double() + shifts.double()
    if not _is_convex(quad):
        return dark
    maps = geometry.homography(quad, (size[0], size[1])).float()[None, None]
    margin = (side - size[0]) // 2
    layers = torch.cat([pair.second, torch.ones(1, *size)])  # the last says where the patch is
    padded = torch.nn.functional.pad(layers, (margin,) * 4)
    *colours, weight = geometry.warp(padded[None], maps, fill="zeros")[0, 0]
    picture: Tensor = torch.stack(colours) + dark * (1 - weight)
    return picture


def _is_convex(quad: Tensor) -> bool:
    """Return whether the corners [4, 2] turn the same way at each."""
    edges = quad.roll(-1, 0) - quad
    following = edges.roll(-1, 0)
    turns = edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0]
    return bool((turns > 0).all())


def _show(axes: Axes, picture: Tensor, title: str) -> None:
    axes.imshow(channels_as_rgb(picture).clamp(0, 1).permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, color=INK, fontsize=10)
