from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import (
    backbone_arguments,
    load_exact,
    read_part,
    read_state_dict,
    rechunk_blocks,
    released_interpolation,
)

STATE = {"norm.weight": torch.tensor([1.0, 2.0]), "blocks.0.attn.backbone.x": torch.tensor([3.0])}


def with_prefix(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "iteration": 12},
        {"teacher": with_prefix("backbone.")},
        {"teacher": with_prefix("backbone.") | {"dino_head.mlp.0.weight": torch.zeros(1)}},
        with_prefix("backbone."),
    ],
    ids=["flat", "model", "teacher", "teacher with heads", "prefixed"],
)
def test_a_form_of_weight_file_is_not_understood(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert_same_state(read_state_dict(tmp_path / "weights.pth"), STATE)


def test_safetensors_are_not_understood(tmp_path: Path) -> None:
    save_file(with_prefix("backbone.") | {"ibot_head.x": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    actual = read_state_dict(str(tmp_path / "teacher.safetensors"))
    assert actual.keys() == STATE.keys()


def test_heads_are_left_out_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(with_prefix("backbone.") | {"dino_head.x": torch.zeros(1)}, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO):
        read_state_dict(tmp_path / "weights.pth")
    assert "left out 1 other tensors" in caplog.text


def test_a_missing_file_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        read_state_dict(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"lr": 0.1}}, [1, 2], {"a": torch.zeros(1), "b": 1}])
def test_a_file_without_weights_is_accepted(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth to hold a state dict"):
        read_state_dict(tmp_path / "weights.pth")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def fill_with_text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, fill_with_text, empty])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_gives_a_traceback(tmp_path: Path, damage: Callable[[Path], None], suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    damage(path)
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        read_state_dict(path)


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_weight_file_can_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Explosive()}, "weights.pth")
    with pytest.raises(ValueError, match="can run code"):
        read_state_dict("weights.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("target", [0, 1, 2, 3])
@pytest.mark.parametrize("source", [0, 1, 2, 3])
def test_renaming_blocks_does_not_fit_the_model(source: int, target: int) -> None:
    state = build_backbone("vit_test_tiny", img_size=16, patch_size=4, block_chunks=source).state_dict()
    model = build_backbone("vit_test_tiny", img_size=16, patch_size=4, block_chunks=target)
    renamed = rechunk_blocks(state, target, 3)
    load_exact(model, renamed)
    assert_same_state(rechunk_blocks(renamed, source, 3), dict(state))


def test_names_outside_the_blocks_are_changed() -> None:
    state = {"cls_token": torch.zeros(1), "decoder.blocks.0.x": torch.zeros(1), "blocks_extra.0.x": torch.zeros(1)}
    assert list(rechunk_blocks(state, 2, 4)) == list(state)


def test_block_12_lands_in_the_wrong_chunk() -> None:
    state = {f"blocks.{index}.norm1.weight": torch.zeros(1) for index in range(24)}
    renamed = list(rechunk_blocks(state, 4, 24))
    assert renamed[11:13] == ["blocks.1.11.norm1.weight", "blocks.2.12.norm1.weight"]


@pytest.fixture
def module() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2, bias=False)})


def test_weights_that_fit_are_not_loaded(module: nn.Module) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    load_exact(module, state)
    assert_same_state(module.state_dict(), state)


def test_differences_are_not_listed_or_something_is_loaded(module: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2, 5), "c.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_exact(module, state)
    message = str(caught.value)
    assert "missing: a.bias;" in message
    assert "unexpected: c.weight;" in message
    assert "of another shape: b.weight (expected [2, 2], got [2, 5])" in message
    assert_same_state(module.state_dict(), before)


def test_an_exception_by_name_is_refused(module: nn.Module) -> None:
    state = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2, 2), "head.x": torch.ones(1)}
    load_exact(module, state, allow_missing=["a.bias"], allow_unexpected=["head.*"])
    assert (module.state_dict()["a.weight"] == 1).all()


def test_an_allowed_name_hides_another_difference(module: nn.Module) -> None:
    state = {"a.weight": torch.ones(3, 5), "b.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"of another shape: a\.weight"):
        load_exact(module, state, allow_missing=["a.*"])


def test_a_long_list_of_differences_is_not_cut(module: nn.Module) -> None:
    state = {f"x{index:03d}": torch.zeros(1) for index in range(100)} | dict(module.state_dict())
    with pytest.raises(ValueError, match=r"x019 and 80 more"):
        load_exact(module, state)


# ------------------------------------------------------------------------------------------------- what weights betray

PLAIN: dict[str, Any] = {
    "img_size": 24,
    "num_register_tokens": 0,
    "init_values": None,
    "ffn_layer": "mlp",
    "qkv_bias": True,
    "proj_bias": True,
    "ffn_bias": True,
}


@pytest.mark.parametrize("block_chunks", [0, 2])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"img_size": 8},
        {"num_register_tokens": 3},
        {"init_values": 1.0},
        {"ffn_layer": "swiglufused"},
        {"ffn_layer": "swiglufused", "ffn_bias": False},
        {"ffn_layer": "identity", "ffn_bias": False},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"ffn_bias": False},
    ],
)
def test_an_argument_is_not_read_off_the_weights(changed: dict[str, Any], block_chunks: int) -> None:
    arguments = PLAIN | changed
    model = build_backbone("vit_test_tiny", patch_size=4, block_chunks=block_chunks, **arguments)
    found = backbone_arguments(model.state_dict(), "w.pth")
    assert found == {"embed_dim": 48, "depth": 3, "patch_size": 4, "in_chans": 3, **arguments}
    again = DinoVisionTransformer(num_heads=3, block_chunks=block_chunks, **found)
    load_exact(again, model.state_dict())


def test_a_rectangle_is_taken_for_a_square() -> None:
    model = build_backbone("vit_test_tiny", img_size=(8, 16), patch_size=4)
    assert "img_size" not in backbone_arguments(model.state_dict(), "w.pth")


def test_other_networks_are_taken_for_a_backbone() -> None:
    with pytest.raises(ValueError, match=r"resnet\.pth to hold a DINOv2 vision transformer, but it has no patch_embed"):
        backbone_arguments({"fc.weight": torch.zeros(1)}, "resnet.pth")


def test_released_positions_are_interpolated_otherwise() -> None:
    assert released_interpolation(0) == {"interpolate_offset": 0.1, "interpolate_antialias": False}
    assert released_interpolation(4) == {"interpolate_offset": 0.0, "interpolate_antialias": True}


def test_a_part_of_a_teacher_is_not_found(tmp_path: Path) -> None:
    teacher = with_prefix("backbone.") | {
        "feature_split.projection.weight": torch.ones(2),
        "feature_splits.x": STATE["norm.weight"],
    }
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    assert_same_state(read_part(tmp_path / "teacher.pth", "feature_split"), {"projection.weight": torch.ones(2)})
    assert read_part(tmp_path / "teacher.pth", "ibot_head") == {}
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_part(tmp_path / "nowhere.pth", "feature_split")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_packed_archive_fills_the_memory(tmp_path: Path, member: str) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith(member):
                archive.writestr(name, content + bytes(2**20), zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(name, content)
    assert path.stat().st_size < 2**14
    with pytest.raises(ValueError, match="compressed archive"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"\x80\x02a.", b"\x80\x02h\x07."], ids=["IndexError", "KeyError"])
def test_spoiled_opcodes_of_a_pickle_end_in_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"])
def test_a_tensor_without_plain_values_is_taken_for_weights(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="state dict"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_of_another_kind_become_weights(module: nn.Module, dtype: torch.dtype) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    name = next(iter(before))
    with pytest.raises(ValueError, match=f"of another kind of numbers: {name} "):
        load_exact(module, before | {name: torch.ones_like(before[name], dtype=dtype)})
    assert_same_state(module.state_dict(), before)


def test_weights_of_half_precision_are_refused(module: nn.Module) -> None:
    load_exact(module, {name: torch.full_like(t, 0.5).half() for name, t in module.state_dict().items()})
    assert all(bool((t == 0.5).all()) and t.dtype == torch.float32 for t in module.state_dict().values())
