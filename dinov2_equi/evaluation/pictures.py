"""Pictures of what a network has learnt: patch features as colours, reconstructions beside their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.data.datasets.channels import channels_as_rgb
from dinov2_equi.evaluation.figures import INK, ORANGE, PURPLE, style_axes
from dinov2_equi.evaluation.transform_regression import ProbeResult

MAX_PICTURE_SIDE = 160
"""Longest side, in pixels, of a picture inside a figure: larger ones only make the file larger."""

_CELL_INCHES = 1.35
_GAP = 0.09  # between pictures, in picture widths
_PAIR_GAP = 0.2
_TITLE_INCHES = 0.52
_ROW_LABEL_INCHES = 0.3
_COLOR_QUANTILE = 0.01
_MAX_SCATTER_POINTS = 600


def pca_colors(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the first three principal components of patch tokens as colours: [n, h, w, 3] float32 in [0, 1].

    The components are those of all patches of all images together, so one colour means one thing in the whole picture.
    Each component is stretched from its 1st to its 99th percentile; a component that does not vary is mid grey. Signs
    are fixed by making each component's largest loading positive, so that the same tokens always give the same colours.

    Args:
        patch_tokens: [n, N, D] float.
        grid: (h, w) with h * w = N.

    Raises:
        ValueError: if the grid does not have N cells.
    """
    n, N, D = patch_tokens.shape
    h, w = grid
    if h * w != N:
        raise ValueError(f"expected a patch grid (h, w) of {N} cells for {N} patch tokens, got {grid} = {h * w} cells")
    tokens = patch_tokens.detach().double().cpu().reshape(n * N, D)  # [n * N, D]
    centred = tokens - tokens.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # columns, smallest variance first
    directions = directions[:, -3:].flip(1)  # [D, min(3, D)], largest variance first
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, min(3, D)]
    components = centred @ (directions * largest.sign())  # [n * N, min(3, D)]
    colors = F.pad(_stretch(components), (0, 3 - components.shape[1]), value=0.5)  # [n * N, 3]
    return colors.float().reshape(n, h, w, 3)


def pca_figure(images: Tensor, color_maps: Mapping[str, Tensor]) -> Figure:
    """Return a figure of photographs above their patch features as colours.

    Args:
        images: [n, 3, H, W] in [0, 1].
        color_maps: label of each further row, such as "after training" -> [n, h, w, 3] from `pca_colors`.

    Raises:
        ValueError: if a row does not have n maps.
    """
    for label, colors in color_maps.items():
        if len(colors) != len(images):
            raise ValueError(f"expected {len(images)} colour maps in row {label!r}, one an image, got {len(colors)}")
    rows = {"photograph": _pictures(images)}
    rows |= {label: list(colors.detach().cpu().numpy()) for label, colors in color_maps.items()}
    layout = _Layout(num_rows=len(rows), aspect=images.shape[-2] / images.shape[-1], left=_ROW_LABEL_INCHES)
    figure = layout.figure([float(column) * (1 + _GAP) for column in range(len(images))])
    for row, (label, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            axes = layout.show(figure, row, column * (1 + _GAP), picture)
            if column == 0:
                axes.set_ylabel(label, color=INK, fontsize=10, labelpad=5)
    return figure


def reconstruction_figure(
    views_1: Tensor,
    views_2: Tensor,
    targets: Tensor,
    reconstructions: Tensor,
    *,
    max_images: int = 5,
) -> Figure:
    """Return a figure with one row an image: view 1, view 2, then each target beside its reconstruction.

    Args:
        views_1: [B, 3, H, W] in [0, 1], the first view.
        views_2: [B, 3, H, W] in [0, 1], the second, transformed view.
        targets: [S, B, 3, H, W] in [0, 1], the images between, first path step first.
        reconstructions: [S, B, 3, H', W'] in [0, 1], what the decoder made of the two views' equivariant features.
        max_images: rows at most.

    Raises:
        ValueError: if the numbers of images or path steps differ, or there is no image.
    """
    S, B = targets.shape[:2]
    if not (len(views_1) == len(views_2) == B == reconstructions.shape[1] and len(reconstructions) == S and B > 0):
        raise ValueError(
            "expected views [B, 3, H, W] with targets and reconstructions [S, B, 3, H, W] and B >= 1, got "
            f"{list(views_1.shape)}, {list(views_2.shape)}, {list(targets.shape)} and {list(reconstructions.shape)}"
        )
    rows = min(B, max_images)
    columns = [
        ("view 1", "one crop", _pictures(views_1[:rows])),
        ("view 2", "other crop, changed", _pictures(views_2[:rows])),
    ]
    for k in range(S):
        columns.append((f"target {k + 1}", f"{k + 1}/{S + 1} of the way", _pictures(targets[k, :rows])))
        columns.append((f"rebuilt {k + 1}", "from features", _pictures(reconstructions[k, :rows])))
    return _picture_table(columns, aspect=views_1.shape[-2] / views_1.shape[-1])


def probe_figure(before: ProbeResult | None, after: ProbeResult, *, output: int = 0) -> Figure:
    """Return a figure of true against predicted values of one parameter, before and after training.

    Args:
        before: the probe on the features of the untrained network, if it was run.
        after: the probe on the features of the trained network, on the same pairs.
        output: index of the parameter.
    """
    panels = [("before training", before, PURPLE)] if before is not None else []
    panels.append(("after training", after, ORANGE))
    figure = Figure(figsize=(2.7 * len(panels), 2.85), layout="constrained")
    limit = float(after.targets[:, output].abs().max()) * 1.25 + 1e-9
    for index, (title, result, color) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        style_axes(axes)
        axes.plot([-limit, limit], [-limit, limit], color=INK, alpha=0.5, linewidth=1.2, linestyle=(0, (4, 3)))
        true = result.targets[:_MAX_SCATTER_POINTS, output].numpy()
        predicted = result.predictions[:_MAX_SCATTER_POINTS, output].clamp(-limit, limit).numpy()
        axes.scatter(true, predicted, s=11, color=color, alpha=0.55, linewidths=0)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set_title(f"{title} \N{MIDDLE DOT} R² {result.r2_per_output[output]:.2f}", color=INK, fontsize=10)
        axes.set_xlabel("true", color=INK, fontsize=10)
        if index == 0:
            axes.set_ylabel("predicted", color=INK, fontsize=10)
    return figure


def _picture_table(columns: Sequence[tuple[str, str, list[NDArray[np.float32]]]], *, aspect: float) -> Figure:
    """Return columns of (title, subtitle, pictures) in pairs, a wider gap between the pairs."""
    layout = _Layout(num_rows=len(columns[0][2]), aspect=aspect, top=_TITLE_INCHES)
    lefts = [column * (1 + _GAP) + column // 2 * _PAIR_GAP for column in range(len(columns))]
    figure = layout.figure(lefts)
    for left, (title, subtitle, pictures) in zip(lefts, columns, strict=True):
        for row, picture in enumerate(pictures):
            axes = layout.show(figure, row, left, picture)
            if row == 0:
                axes.set_title(title, color=INK, fontsize=11, fontweight="bold", pad=18)
                above = axes.transAxes + ScaledTranslation(0, 5 / 72, figure.dpi_scale_trans)  # 5 points higher
                axes.text(0.5, 1.0, subtitle, transform=above, ha="center", color=INK, fontsize=9)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Places pictures of one size exactly; distances to the right are in picture widths, margins in inches."""

    num_rows: int
    aspect: float  # height of a picture over its width
    left: float = 0.0
    top: float = 0.0

    def figure(self, lefts: Sequence[float]) -> Figure:
        """Return an empty figure for columns that begin at `lefts`."""
        width = self.left + (max(lefts) + 1) * _CELL_INCHES
        height = self.top + (self.num_rows * (self.aspect + _GAP) - _GAP) * _CELL_INCHES
        return Figure(figsize=(width, height))

    def show(self, figure: Figure, row: int, left: float, picture: NDArray[np.float32]) -> Axes:
        """Return the axes of a picture placed in `row`, its left edge at `left`."""
        width, height = figure.get_size_inches()
        bottom = height - self.top - (row * (self.aspect + _GAP) + self.aspect) * _CELL_INCHES
        size = (_CELL_INCHES / width, self.aspect * _CELL_INCHES / height)
        axes = figure.add_axes((((self.left + left * _CELL_INCHES) / width), bottom / height, *size))
        # "none" hands the pixels to the SVG as they are and leaves their scaling to the browser.
        axes.imshow(picture, interpolation="none", vmin=0, vmax=1, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes


def _pictures(images: Tensor) -> list[NDArray[np.float32]]:
    """Return images [n, C, H, W] in [0, 1] as arrays [H', W', 3], no side longer than `MAX_PICTURE_SIDE`."""
    images = channels_as_rgb(images).detach().float().cpu().clamp(0, 1)
    factor = MAX_PICTURE_SIDE / max(images.shape[-2:])
    if factor < 1:
        size = (max(1, round(images.shape[-2] * factor)), max(1, round(images.shape[-1] * factor)))
        images = F.interpolate(images, size=size, mode="area")
    return list(images.permute(0, 2, 3, 1).numpy())  # n times [H', W', 3]


def _stretch(components: Tensor) -> Tensor:
    """Map each column's 1st..99th percentile to 0..1, clipped; a constant column becomes 0.5."""
    # NumPy's quantile: torch's refuses more than 16 million elements.
    low, high = torch.from_numpy(np.quantile(components.numpy(), (_COLOR_QUANTILE, 1 - _COLOR_QUANTILE), axis=0))
    spread = high - low
    scaled = ((components - low) / torch.where(spread > 0, spread, 1.0)).clamp(0, 1)
    return torch.where(spread > 1e-9, scaled, 0.5)
