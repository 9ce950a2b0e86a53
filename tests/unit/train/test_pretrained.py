"""Start from other weights: the backbone exactly, positions resampled, heads where they fit; and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.models.layouts import to_transformers
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.weights import resample_positions
from dinov2_equi.train.build import load_initial_weights
from dinov2_equi.train.export import export_teacher
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]


def build(cfg: Config, seed: int = 0) -> SSLMetaArch:
    torch.manual_seed(seed)
    return SSLMetaArch(cfg)


def same(first: Any, second: Any) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def started(make_config: MakeConfig, path: Path, *overrides: str) -> SSLMetaArch:
    cfg = make_config(f"student.pretrained_weights={path}", *overrides)
    model = build(cfg, seed=1)
    load_initial_weights(model, cfg)
    return model


@pytest.mark.parametrize("overrides", [(), ("equi.projection_dim=40", "equi.dim=12")], ids=["slices", "projection"])
def test_own_teacher_loses_its_heads(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]
) -> None:
    source = build(make_config(*overrides))
    export_teacher(source, tmp_path)
    with caplog.at_level(logging.INFO):
        model = started(make_config, tmp_path / "teacher_checkpoint.pth", *overrides)
    assert same(model.student, source.teacher) and same(model.teacher, source.teacher)
    assert "dino_head is taken as well" in caplog.text
    assert "resampled" not in caplog.text and "random" not in caplog.text


def test_head_of_other_shapes_is_an_error_or_goes_unnoticed(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build(make_config())
    export_teacher(source, tmp_path)
    with caplog.at_level(logging.INFO):
        model = started(make_config, tmp_path / "teacher_checkpoint.pth", "dino.head_n_prototypes=24")
    assert same(model.student["backbone"], source.teacher["backbone"])
    assert same(model.student["dino_head"], model.teacher["dino_head"])
    assert "dino_head is of other shapes, it starts from random weights" in caplog.text


def test_backbone_alone_starts_with_the_heads_of_the_teacher_and_the_student_apart(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build(make_config())
    export_teacher(source, tmp_path)
    with caplog.at_level(logging.INFO):
        model = started(make_config, tmp_path / "teacher_backbone.safetensors")
    assert same(model.student["backbone"], source.teacher["backbone"])
    assert same(model.student["dino_head"], model.teacher["dino_head"])
    assert "dino_head is not in the file" in caplog.text


def test_positions_of_another_size_do_not_load(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make_config()
    large = build_backbone("vit_test_tiny", img_size=80, patch_size=8, init_values=1e-5)
    torch.save(to_transformers(large.state_dict()), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        model = started(make_config, tmp_path / "w.pth")
    side = cfg.crops.global_crops_size // 8
    assert f"resampled from 100 patches to {side} x {side}" in caplog.text
    expected = resample_positions(large.state_dict(), (side, side))["pos_embed"]
    assert torch.equal(model.student["backbone"].pos_embed, expected)
    assert torch.equal(model.student["backbone"].cls_token, large.cls_token)


def test_resampled_positions_turn_or_lose_the_class_token() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")
    stored = torch.cat([torch.full((1, 1, 2), 9.0), torch.stack([rows, columns], -1).reshape(1, 144, 2)], dim=1)
    found = resample_positions({"pos_embed": stored, "x": stored}, (6, 4))["pos_embed"]
    assert found.shape == (1, 25, 2)
    assert torch.equal(found[:, 0], stored[:, 0])
    grid = found[0, 1:].reshape(6, 4, 2)
    # A ramp stays a ramp away from the borders, which the cubic kernel repeats.
    half = 11 / 12  # centre of the outer of 12 samples over [-1, 1] in units of half the image
    expected_rows = torch.linspace(-1 + 1 / 6, 1 - 1 / 6, 6) / half
    torch.testing.assert_close(grid[1:-1, :, 0], expected_rows[1:-1, None].expand(4, 4), rtol=0, atol=0.02)
    assert (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
    same_size = resample_positions({"pos_embed": stored}, (12, 12))["pos_embed"]
    torch.testing.assert_close(same_size, stored, rtol=0, atol=1e-6)


def test_positions_of_a_rectangle_are_taken_for_a_square() -> None:
    with pytest.raises(ValueError, match="square patch grid, got 6 patches"):
        resample_positions({"pos_embed": torch.zeros(1, 7, 4)}, (2, 2))


def test_backbone_of_another_architecture_loads(make_config: MakeConfig, tmp_path: Path) -> None:
    torch.save(build_backbone("vit_micro", img_size=32, patch_size=8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="do not fit DinoVisionTransformer; missing"):
        started(make_config, tmp_path / "w.pth")
