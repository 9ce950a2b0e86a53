from __future__ import annotations

import torch

from dinov2_equi.layers.packing import pack, split_groups


def test_groups_change_by_packing_and_splitting() -> None:
    groups = [torch.randn(2, 5, 3), torch.randn(4, 2, 3), torch.randn(0, 7, 3)]
    rows, layout = pack(groups)
    assert rows.shape == (2 * 5 + 4 * 2, 3)
    assert layout == ((2, 5), (4, 2), (0, 7))
    for group, expected in zip(split_groups(rows, layout), groups, strict=True):
        torch.testing.assert_close(group, expected, rtol=0, atol=0)


def test_rows_are_not_image_after_image() -> None:
    rows, _ = pack([torch.arange(6).view(2, 3, 1), torch.arange(6, 10).view(2, 2, 1)])
    assert rows.flatten().tolist() == list(range(10))


def test_one_group_is_copied() -> None:
    group = torch.randn(2, 3, 4)
    assert pack([group])[0].data_ptr() == group.data_ptr()


def test_trailing_axes_are_lost() -> None:
    heads = torch.randn(6, 2, 8)
    assert [tuple(group.shape) for group in split_groups(heads, ((1, 4), (2, 1)))] == [(1, 4, 2, 8), (2, 1, 2, 8)]
