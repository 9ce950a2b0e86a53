"""Pairs that differ by a homography, and the head that finds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.transform import ProjectiveTransform
from torch import Tensor

from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.evaluation.dense.training import Losses
from dinov2_equi.evaluation.dense_features import whole_patches
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.homography import (
    HomographyHead,
    HomographyNet,
    HomographyResult,
    HomographySettings,
    fit_homography,
)
from dinov2_equi.evaluation.homography_figure import homography_figure, put_back
from dinov2_equi.evaluation.homography_pairs import (
    TEST_STREAM,
    HomographyPairs,
    PairSettings,
    corner_errors,
    make_pair,
)
from dinov2_equi.evaluation.model import random_backbone

PAIRS = PairSettings(image_size=(56, 80), patch=32, max_shift=8)
SETTINGS = HomographySettings(pairs=PAIRS, width=16, steps=6, batch_size=4, test_pairs=5)
CORNERS = np.array([[0.0, 0.0], [32.0, 0.0], [32.0, 32.0], [0.0, 32.0]])  # of the patch, from its own corner


def images(length: int = 7, seed: int = 0) -> SyntheticImages:
    return SyntheticImages(length, size=(50, 90), seed=seed)


def model() -> EvalModel:
    return EvalModel("tiny", random_backbone("vit_test_tiny", img_size=32, patch_size=8), patch_size=8)


def smooth_image() -> Tensor:
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(80.0), indexing="ij")
    return torch.stack([(x + 0.5) / 80, (y + 0.5) / 56, (x * y) / (80 * 56)])


def solved(shifts: Tensor) -> np.ndarray:
    """The homography by the eight linear equations of four points."""
    rows, right = [], []
    for (x, y), (u, v) in zip(CORNERS, CORNERS + shifts.double().numpy(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


@pytest.mark.parametrize("seed", range(4))
def test_second_patch_does_not_show_the_quadrilateral(seed: int) -> None:
    """Red and green of the image say where a pixel comes from, so the second patch must hold H of its own places."""
    pair = make_pair(smooth_image(), PAIRS, np.random.default_rng(seed))
    matrix = solved(pair.shifts)
    np.testing.assert_allclose(ProjectiveTransform(matrix)(CORNERS), CORNERS + pair.shifts.numpy(), atol=1e-4)
    left, top = float(pair.first[0, 0, 0]) * 80 - 0.5, float(pair.first[1, 0, 0]) * 56 - 0.5
    for row, column in ((0, 0), (0, 31), (31, 31), (31, 0), (10, 20)):
        x, y, w = matrix @ [column + 0.5, row + 0.5, 1.0]
        expected = [(x / w + left) / 80, (y / w + top) / 56]
        # Linear colours are resampled exactly, in float32: 1e-4 is a hundredth of a pixel.
        np.testing.assert_allclose(pair.second[:2, row, column].numpy(), expected, atol=1e-4)


def test_patches_leave_the_image_or_the_middle_of_their_window() -> None:
    for seed in range(20):
        pair = make_pair(smooth_image(), PAIRS, np.random.default_rng(seed))
        assert pair.first.shape == pair.second.shape == (3, 32, 32) and pair.window.shape == (3, 48, 48)
        assert torch.equal(pair.window[:, 8:40, 8:40], pair.first)
        assert pair.shifts.abs().max() <= 8
        assert 0 <= pair.second.min() and pair.second.max() <= 1


def test_without_shifts_the_patches_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(np.random.Generator):
        def uniform(self, *arguments: object, **options: object) -> np.ndarray:  # type: ignore[override]
            return np.zeros((4, 2))

    pair = make_pair(smooth_image(), PAIRS, Still(np.random.PCG64(0)))
    torch.testing.assert_close(pair.second, pair.first, atol=1e-5, rtol=0)  # float32 of the sampling grid


def test_a_pair_depends_on_what_was_asked_for_before() -> None:
    options = {"length": 20, "seed": 3}
    pairs = HomographyPairs(images(), PAIRS, **options)  # type: ignore[arg-type]
    again = HomographyPairs(images(), PAIRS, **options)  # type: ignore[arg-type]
    assert len(again) == 20 and pairs[3] is not None
    for mine, other in zip(again[14], pairs[14], strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(pairs[0].shifts, HomographyPairs(images(), PAIRS, length=20, seed=4)[0].shifts)
    assert not torch.equal(
        pairs[0].shifts, HomographyPairs(images(), PAIRS, length=20, seed=3, stream=TEST_STREAM)[0].shifts
    )


def test_images_read_in_full_precision_become_black(monkeypatch: pytest.MonkeyPatch) -> None:
    source = images()
    expected = HomographyPairs(source, PAIRS, length=1)[0]
    load: Callable[..., Tensor] = source.load_tensor
    monkeypatch.setattr(source, "load_tensor", lambda index, side=None: load(index, side).float() / 255)
    found = HomographyPairs(source, PAIRS, length=1)[0]
    torch.testing.assert_close(found.first, expected.first, atol=2 / 255, rtol=0)  # rounded in rows and columns


def test_a_pass_leaves_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    source = images()
    seen: list[int] = []
    load: Callable[..., Tensor] = source.load_tensor
    monkeypatch.setattr(source, "load_tensor", lambda index, side=None: seen.append(index) or load(index, side))
    pairs = HomographyPairs(source, PAIRS, length=14)
    for number in range(14):
        pairs[number]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]


def test_corner_error_is_not_the_mean_length() -> None:
    shifts = torch.zeros(2, 4, 2)
    predicted = shifts.clone()
    predicted[0, 1] = torch.tensor([3.0, -4.0])
    predicted[1] = torch.tensor([6.0, 8.0])
    assert corner_errors(predicted, shifts).tolist() == [1.25, 10.0]


def test_standing_still_is_not_measured_beside() -> None:
    pairs = HomographyPairs(images(), PAIRS, length=60)
    shifts = torch.stack([pairs[number].shifts for number in range(60)])
    result = HomographyResult(corner_errors(shifts, shifts), shifts, shifts, [])
    assert result.mean_corner_error == 0.0
    expected = (math.sqrt(2) + math.log(1 + math.sqrt(2))) / 3 * 8  # mean distance of a square's points from its centre
    assert result.identity_error == pytest.approx(expected, rel=0.1)  # 240 corners: a standard error of 2 %


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (9, 9), (5, 8)])
def test_head_does_not_fit_a_grid(grid: tuple[int, int]) -> None:
    head = HomographyHead(6, grid, 16, 8.0)
    assert head(torch.randn(2, 6, *grid), torch.randn(2, 6, *grid)).shape == (2, 4, 2)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in head.layers) == 3


def test_head_learns_nothing_from_pixels_that_move() -> None:
    """Shifts of the whole pattern, all corners alike, on features that are a bump: an easy form of the task."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = HomographyHead(1, (8, 8), 16, 2.0)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")

    def bump(at: Tensor) -> Tensor:
        return torch.exp(-((x - 3.5 - at[:, 0, None, None]) ** 2 + (y - 3.5 - at[:, 1, None, None]) ** 2) / 4)[:, None]

    errors = []
    for _ in range(60):
        shift = (torch.rand(32, 2, generator=generator) - 0.5) * 4
        predicted = head(bump(torch.zeros_like(shift)), bump(-shift))
        errors.append(corner_errors(predicted, shift[:, None].expand(-1, 4, -1)).mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.3 * errors[0]


def test_a_stopped_training_ends_elsewhere(tmp_path: Path) -> None:
    whole = fit_homography(model(), images(), images(3, seed=9), SETTINGS, tmp_path / "whole")
    done: list[int] = []

    def stop(step: int, losses: Losses) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_homography(model(), images(), images(3, seed=9), SETTINGS, tmp_path / "b", save_every=3, on_step=stop)
    again = fit_homography(
        model(),
        images(),
        images(3, seed=9),
        SETTINGS,
        tmp_path / "b",
        save_every=3,
        on_step=lambda step, losses: done.append(step),
    )
    assert done == [4, 5, 6]
    assert torch.equal(again.predicted, whole.predicted) and again.losses == whole.losses
    other = dataclasses.replace(SETTINGS, lr=1.0)
    with pytest.raises(ValueError, match="holds a training that differs in loop, settings"):
        fit_homography(model(), images(), images(3, seed=9), other, tmp_path / "b")


def test_a_frozen_backbone_moves_or_a_trained_one_stays(tmp_path: Path) -> None:
    for lr, moves in ((0.0, False), (1e-3, True)):
        tiny = model()
        before = {name: p.clone() for name, p in tiny.backbone.state_dict().items()}
        settings = dataclasses.replace(SETTINGS, backbone_lr=lr, steps=2)
        fit_homography(tiny, images(), images(3, seed=9), settings, tmp_path / str(lr))
        after = tiny.backbone.state_dict()
        assert any(not torch.equal(after[name], value) for name, value in before.items()) == moves


def test_patches_are_not_resized_to_whole_patches() -> None:
    odd = EvalModel("tiny", random_backbone("vit_test_tiny", img_size=28, patch_size=14), patch_size=14)
    net = HomographyNet(odd, SETTINGS)
    assert net.size == whole_patches((32, 32), 14) == (28, 28)
    assert net(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)).shape == (2, 4, 2)
    assert HomographyNet(odd, dataclasses.replace(SETTINGS, input_size=60)).size == (56, 56)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"pairs": PairSettings(patch=128, max_shift=33)}, "quarter of the patch"),
        ({"pairs": PairSettings(image_size=(100, 320))}, "at least 192 pixels"),
        ({"steps": 0}, "steps = 0"),
        ({"lr": 0.0}, "lr = 0.0"),
    ],
)
def test_settings_out_of_range_are_accepted(faulty: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **faulty).check()  # type: ignore[arg-type]


def test_the_second_patch_is_not_put_back() -> None:
    pair = make_pair(smooth_image(), PAIRS, np.random.default_rng(1))
    back = put_back(pair, pair.shifts)
    quad = np.array([[8.0, 8.0]] * 4) + CORNERS + pair.shifts.numpy()
    inner = np.array([quad.mean(axis=0)] * 4) * 0.2 + quad * 0.8  # well inside the quadrilateral
    for x, y in inner:
        row, column = int(y), int(x)
        # Resampled twice: a linear image survives it to a hundredth.
        torch.testing.assert_close(back[:, row, column], pair.window[:, row, column], atol=0.01, rtol=0)
    assert torch.equal(back[:, 0, 0], pair.window[:, 0, 0] * 0.35)


def test_a_folded_answer_stops_the_picture() -> None:
    pair = make_pair(smooth_image(), PAIRS, np.random.default_rng(1))
    folded = torch.tensor([[40.0, 0.0], [-40.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.equal(put_back(pair, folded), pair.window * 0.35)
    assert len(homography_figure([pair], folded[None]).axes) == 4
    with pytest.raises(ValueError, match="an answer for each, got 1 and 2"):
        homography_figure([pair], torch.zeros(2, 4, 2))
