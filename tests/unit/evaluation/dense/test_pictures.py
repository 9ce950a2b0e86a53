"""Pictures of dense predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_equi.evaluation.dense.pictures import (
    UNKNOWN,
    _with_boxes,
    boxes_figure,
    class_colors,
    class_palette,
    depth_colors,
    depth_figure,
    rows_figure,
    segmentation_figure,
    small,
)
from dinov2_equi.evaluation.figures import figure_array

IMAGE = torch.full((3, 40, 60), 90, dtype=torch.uint8)


def test_classes_share_a_colour_or_none_has_one_of_theirs() -> None:
    palette = class_palette(150)
    assert len({tuple(color) for color in palette.round(6).tolist()}) == 150
    assert palette.min() >= 0 and palette.max() <= 1
    found = class_colors(torch.tensor([[[0, 2, 255]]]), 3)
    assert np.array_equal(found[0], [class_palette(3)[0], class_palette(3)[2], UNKNOWN])


def test_near_is_darker_than_far_or_unknown_depth_is_coloured() -> None:
    near, middle, far, unknown = depth_colors(torch.tensor([[[1.0, 2.0, 3.0, 0.0]]]), 1.0, 3.0)[0]
    assert near.mean() > middle.mean() > far.mean()
    assert tuple(unknown) == UNKNOWN


def test_labels_are_mixed_when_a_picture_shrinks() -> None:
    labels = torch.tensor([0, 200]).repeat(400)[None, None].expand(1, 100, 800)
    shrunk = small(labels, is_label=True)
    assert shrunk.shape == (1, 40, 320) and set(shrunk.unique().tolist()) <= {0, 200}
    assert small(torch.zeros(3, 100, 800, dtype=torch.uint8), is_label=False).shape == (3, 40, 320)
    assert small(labels[..., :100], is_label=True).shape == (1, 100, 100)  # never made larger


def test_boxes_and_masks_are_drawn_elsewhere() -> None:
    palette = class_palette(2)
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[:, 20:30, 20:40] = True
    box, label = torch.tensor([[10.0, 12.0, 50.0, 34.0]]), torch.tensor([1])
    plain = _with_boxes(IMAGE, box[:0], label[:0], palette, masks[:0])
    assert np.allclose(plain, 90 / 255)
    drawn = _with_boxes(IMAGE, box, label, palette, masks)
    changed = (np.abs(drawn - plain).sum(axis=-1) > 0.05).nonzero()
    assert (changed[0].min(), changed[1].min()) == (12, 10) and changed[0].max() <= 35 and changed[1].max() <= 51
    # Colours are whole numbers of 255; half a level is 0.002.
    assert np.allclose(drawn[12, 30], palette[1], atol=0.003)
    assert np.allclose(drawn[25, 30], 0.55 * 90 / 255 + 0.45 * palette[1], atol=0.01)
    assert np.allclose(drawn[16, 15], 90 / 255)


def test_figures_are_empty() -> None:
    depth, labels = torch.rand(1, 40, 60) + 1, torch.randint(0, 2, (1, 40, 60))
    objects = (torch.tensor([[10.0, 12.0, 50.0, 34.0]]), torch.tensor([1]))
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    figures = (
        depth_figure([IMAGE] * 2, [depth, torch.zeros(1, 40, 60)], [depth] * 2),  # the second has no known depth
        segmentation_figure([IMAGE], [labels], [labels], ["sky", "road"]),
        boxes_figure([IMAGE], [objects], [nothing], ["sky", "road"]),
    )
    for figure in figures:
        pixels = figure_array(figure)
        assert pixels.shape[1] > 250 and pixels.std() > 20
    with pytest.raises(ValueError, match=r"the same number of pictures, got \[1, 2\]"):
        rows_figure({"a": [np.zeros((2, 2, 3))], "b": [np.zeros((2, 2, 3))] * 2})
