"""Pictures of dense predictions: photographs in one row, what is true and what was found below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dinov2_equi.evaluation.figures import INK

PICTURE_SIDE = 320
"""Longest side of a picture in a figure, pixels."""

UNKNOWN = (0.85, 0.85, 0.85)
_CELL_INCHES = 2.4
_GOLDEN = 0.61803398875

Picture = NDArray[np.float64]
"""[H, W, 3] in [0, 1]."""


def small(values: Tensor, *, is_label: bool) -> Tensor:
    """Return an image or map [C, H, W] shrunk to the size of a picture; labels by the nearest pixel."""
    height, width = values.shape[-2:]
    factor = PICTURE_SIDE / max(height, width)
    if factor >= 1:
        return values
    size = [max(round(side * factor), 1) for side in (height, width)]
    if is_label:
        nearest: Tensor = v2.functional.resize_mask(values, size)
        return nearest
    resized: Tensor = v2.functional.resize_image(values, size, antialias=True)
    return resized


def photograph(image: Tensor) -> Picture:
    """Return an image, uint8 [3, H, W], as a picture."""
    return small(image, is_label=False).permute(1, 2, 0).double().numpy() / 255.0


def depth_colors(depth: Tensor, low: float, high: float) -> Picture:
    """Return depth [1, H, W] as colours, near bright and far dark; light grey where it is 0, unknown."""
    values = small(depth, is_label=True)[0].double().numpy()
    share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    colors: Picture = mpl.colormaps["magma_r"](share)[..., :3]
    colors[values <= 0] = UNKNOWN
    return colors


def class_palette(count: int) -> Picture:
    """Return a colour for each class, [count, 3] in [0, 1]; neighbours differ in hue and lightness."""
    hues = (np.arange(count) * _GOLDEN) % 1.0
    saturation = np.where(np.arange(count) % 2, 0.55, 0.85)
    value = np.array([0.95, 0.75, 0.55])[np.arange(count) % 3]
    colors: Picture = mpl.colors.hsv_to_rgb(np.stack([hues, saturation, value], axis=1))
    return colors


def class_colors(labels: Tensor, count: int) -> Picture:
    """Return a class map [1, H, W] as colours; grey where the number is no class."""
    values = small(labels, is_label=True)[0].numpy()
    known = (values >= 0) & (values < count)
    colors: Picture = class_palette(count)[np.where(known, values, 0)]
    colors[~known] = UNKNOWN
    return colors


def rows_figure(rows: Mapping[str, Sequence[Picture]], legend: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """Return a figure with one labelled row of pictures for each entry, and names of colours below.

    Raises:
        ValueError: the rows differ in length, or there is no picture.
    """
    counts = {len(pictures) for pictures in rows.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"expected rows of the same number of pictures, got {sorted(counts)}")
    (columns,) = counts
    aspect = float(np.mean([p.shape[0] / p.shape[1] for pictures in rows.values() for p in pictures]))
    legend_inches = 0.22 * math.ceil(len(legend) / 6) + 0.1 if legend else 0.0
    height = _CELL_INCHES * aspect * len(rows) + legend_inches
    figure = Figure(figsize=(_CELL_INCHES * columns + 0.4, height + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
        axes[row, 0].set_ylabel(label, color=INK)
    if legend:
        handles = [mpl.patches.Patch(color=tuple(color), label=name) for name, color in legend.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def depth_figure(images: Sequence[Tensor], truths: Sequence[Tensor], found: Sequence[Tensor]) -> Figure:
    """Return photographs above true and predicted depth, in the same colours for both; grey: unknown.

    Args:
        images: uint8 [3, H, W] each.
        truths: [1, H, W] metres each, 0 where unknown.
        found: [1, H, W] metres each.
    """
    rows: dict[str, list[Picture]] = {"photograph": [], "true depth": [], "predicted depth": []}
    for image, truth, depth in zip(images, truths, found, strict=True):
        known = truth[truth > 0] if (truth > 0).any() else depth.flatten()
        low, high = (float(torch.quantile(known[:: max(len(known) // 100_000, 1)], q)) for q in (0.02, 0.98))
        rows["photograph"].append(photograph(image))
        rows["true depth"].append(depth_colors(truth, low, high))
        rows["predicted depth"].append(depth_colors(depth, low, high))
    return rows_figure(rows)


def segmentation_figure(
    images: Sequence[Tensor], truths: Sequence[Tensor], found: Sequence[Tensor], classes: Sequence[str]
) -> Figure:
    """Return photographs above true and predicted classes; grey: none. The legend names the classes in the picture.

    Args:
        images: uint8 [3, H, W] each.
        truths: integers [1, H, W] each; a number that is no class stands for none.
        found: integers [1, H, W] each.
        classes: their names.
    """
    rows = {
        "photograph": [photograph(image) for image in images],
        "true classes": [class_colors(labels, len(classes)) for labels in truths],
        "predicted": [class_colors(labels, len(classes)) for labels in found],
    }
    numbers = {int(number) for labels in (*truths, *found) for number in labels.unique()}
    palette = class_palette(len(classes))
    legend = {classes[number]: palette[number] for number in sorted(numbers) if 0 <= number < len(classes)}
    return rows_figure(rows, legend)


def boxes_figure(
    images: Sequence[Tensor],
    truths: Sequence[tuple[Tensor, Tensor]],
    found: Sequence[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    masks: Sequence[Tensor] | None = None,
) -> Figure:
    """Return photographs with true boxes above the same with the boxes that were found.

    Args:
        images: uint8 [3, H, W] each.
        truths: boxes [n, 4] (left, top, right, bottom) and class numbers [n], counted from 0, of each image.
        found: the same.
        classes: their names.
        masks: bool [n, H, W] of what was found, laid over it; None: no masks.
    """
    palette = class_palette(len(classes))
    overlays: Sequence[Tensor | None] = masks if masks is not None else [None] * len(images)
    rows = {
        "true": [_with_boxes(i, *t, palette, None) for i, t in zip(images, truths, strict=True)],
        "found": [_with_boxes(i, *f, palette, m) for i, f, m in zip(images, found, overlays, strict=True)],
    }
    numbers = {int(number) for _, labels in (*truths, *found) for number in labels.unique()}
    return rows_figure(rows, {classes[number]: palette[number] for number in sorted(numbers)})


def _with_boxes(image: Tensor, boxes: Tensor, labels: Tensor, palette: Picture, masks: Tensor | None) -> Picture:
    """Return a photograph with coloured boxes, and masks under them where there are any."""
    colors = [tuple(round(255 * part) for part in palette[int(number)]) for number in labels]
    width = max(round(2 * max(image.shape[-2:]) / PICTURE_SIDE), 1)
    if len(boxes) and masks is not None:
        image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    if len(boxes):
        image = draw_bounding_boxes(image, boxes, colors=colors, width=width)
    return photograph(image)
