"""Backbones from weight files alone, and the baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2_equi.evaluation.model import RawPixels, load_backbone, random_backbone
from dinov2_equi.models.registry import ARCHS, build_backbone

X = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_register_tokens": 2, "init_values": 0.5, "interpolate_offset": 0.0, "interpolate_antialias": True},
        {"ffn_layer": "swiglufused", "block_chunks": 2},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    ],
)
def test_the_architecture_is_read_off_the_weights(tmp_path: Path, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_test_tiny", img_size=32, patch_size=8, **options).eval()  # type: ignore[arg-type]
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    loaded = load_backbone(tmp_path / "w.safetensors")
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(
            loaded.forward_features(X)["x_norm_patchtokens"], backbone.forward_features(X)["x_norm_patchtokens"]
        )


@pytest.mark.parametrize("num_registers", [0, 4])
def test_positions_are_interpolated_as_released_unless_told_otherwise(tmp_path: Path, num_registers: int) -> None:
    backbone = build_backbone("vit_test_tiny", img_size=32, patch_size=8, num_register_tokens=num_registers)
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    released = load_backbone(tmp_path / "w.safetensors")
    expected = (0.0, True) if num_registers else (0.1, False)
    assert (released.interpolate_offset, released.interpolate_antialias) == expected
    told = load_backbone(tmp_path / "w.safetensors", interpolate_offset=0.05, interpolate_antialias=False)
    assert (told.interpolate_offset, told.interpolate_antialias) == (0.05, False)


def test_a_rectangular_position_embedding_is_refused(tmp_path: Path) -> None:
    save_file(build_backbone("vit_test_tiny", img_size=(16, 32), patch_size=8).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"square position embedding in .*w\.safetensors, got \[1, 9, 48\]"):
        load_backbone(tmp_path / "w.safetensors")


def test_a_teacher_checkpoint_of_a_run_is_read(tmp_path: Path) -> None:
    backbone = build_backbone("vit_test_tiny", img_size=32, patch_size=8)
    teacher = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"teacher": {**teacher, "dino_head.last_layer.weight_g": torch.ones(3, 1)}}, tmp_path / "t.pth")
    loaded = load_backbone(tmp_path / "t.pth", arch="vit_test_tiny")
    assert torch.equal(loaded.cls_token, backbone.cls_token)


def test_a_file_that_is_no_vision_transformer_is_named(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"resnet\.safetensors.*patch_embed"):
        load_backbone(tmp_path / "resnet.safetensors")


def test_an_unknown_size_lists_the_known_ones(tmp_path: Path) -> None:
    state = build_backbone("vit_test_tiny", img_size=32, patch_size=8).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.2")}
    width = ARCHS["vit_test_tiny"].embed_dim
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"{width} wide and 2 blocks deep.*vit_small"):
        load_backbone(tmp_path / "w.safetensors")


def test_an_architecture_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file(build_backbone("vit_test_tiny", img_size=32, patch_size=8).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone(tmp_path / "w.safetensors", arch="vit_tiny")


def test_random_weights_follow_the_seed_and_leave_the_callers_random_state() -> None:
    state = torch.get_rng_state()
    first, same, other = (random_backbone("vit_test_tiny", img_size=32, patch_size=8, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = [backbone.patch_embed.proj.weight for backbone in (first, same, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


def test_raw_pixels_are_the_picture_made_smaller() -> None:
    features = RawPixels(side=2).forward_features(X)
    expected = torch.stack([X[0, c, :12, :20].mean() for c in range(3)])
    torch.testing.assert_close(features["x_norm_patchtokens"][0, 0], expected)
    assert features["x_norm_clstoken"].shape == (1, 12)
