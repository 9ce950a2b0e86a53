"""Weights under the names of timm and transformers: the same outputs there and here, and every tensor accounted for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_equi.models.layouts import as_dinov2, from_timm, from_transformers, to_timm, to_transformers
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact, read_state_dict

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "gated": {"ffn_layer": "swiglufused"},
}
SIZE = 28


def backbone(kind: str) -> DinoVisionTransformer:
    """Return a tiny backbone of which no weight is 0 or 1, so that none can be mistaken for another."""
    model = build_backbone("vit_test_tiny", img_size=SIZE, patch_size=14, init_values=1.0, **KINDS[kind]).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model: DinoVisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features = model.forward_features(x)
    return features["x_norm_clstoken"], features["x_norm_patchtokens"]


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def load_by_transformers(transformers: Any, kind: str, state: dict[str, Tensor], folder: Path) -> Any:
    """Return the model that transformers loads from files with these weights; it must take all of them."""
    name = "Dinov2WithRegisters" if kind == "registers" else "Dinov2"
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIZE}
    config = getattr(transformers, f"{name}Config")(**sizes, patch_size=14, use_swiglu_ffn=kind == "gated")
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = getattr(transformers, f"{name}Model").from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_sees_other_features_with_the_same_weights(transformers: Any, kind: str, tmp_path: Path) -> None:
    ours = backbone(kind)
    theirs = load_by_transformers(transformers, kind, to_transformers(ours.state_dict()), tmp_path)
    x = torch.randn(2, 3, SIZE, SIZE)  # their position embedding is resampled otherwise at other sizes
    found = theirs(pixel_values=x).last_hidden_state
    cls, patches = outputs(ours, x)
    torch.testing.assert_close(found[:, 0], cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, -4:], patches, rtol=0, atol=1e-5)
    again, _ = as_dinov2(theirs.state_dict())  # under the names of the version that is installed
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_way_to_transformers_and_back_changes_a_tensor(kind: str) -> None:
    state = backbone(kind).state_dict()
    again, library = as_dinov2(to_transformers(state))
    assert library == "transformers"
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def names_in_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' weights under the names that late versions 5 use in a loaded model."""
    new = {}
    for name, tensor in state.items():
        for part, former in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = name.replace(f"attention.attention.{former}", f"attention.{part}")
        name = name.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        if "weights_in" in name:
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                new[name.replace("weights_in", part)] = half
        else:
            new[name] = tensor
    return new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_names_of_late_versions_of_transformers_do_not_load(kind: str, prefix: str) -> None:
    state = backbone(kind).state_dict()
    new = {f"{prefix}{name}": tensor for name, tensor in names_in_memory(to_transformers(state)).items()}
    if prefix:
        new["classifier.weight"] = torch.zeros(2, 2)
    again, _ = as_dinov2(new)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def timm_model(kind: str) -> Any:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {"mlp_ratio": 4}
    if kind == "gated":
        options = {"mlp_ratio": 2 * 128 / 48, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    if kind == "registers":
        options |= {"reg_tokens": 4, "no_embed_class": True}
    return VisionTransformer(
        img_size=SIZE, patch_size=14, embed_dim=48, depth=3, num_heads=3, init_values=1.0, num_classes=0, **options
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_sees_other_features_with_the_same_weights(kind: str) -> None:
    theirs, ours = timm_model(kind), backbone(kind)
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    x = torch.randn(2, 3, SIZE, SIZE)
    found = theirs.forward_features(x)
    cls, patches = outputs(ours, x)
    torch.testing.assert_close(found[:, 0], cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, -4:], patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_weights_do_not_load_from_a_file(tmp_path: Path, kind: str) -> None:
    theirs, ours = timm_model(kind), backbone(kind)
    save_file({**theirs.state_dict(), "head.weight": torch.zeros(3, 48)}, tmp_path / "model.safetensors")
    load_exact(ours, read_state_dict(tmp_path / "model.safetensors"))
    x = torch.randn(1, 3, SIZE, SIZE)
    torch.testing.assert_close(outputs(ours, x)[0], theirs.forward_features(x)[:, 0], rtol=0, atol=1e-5)
    assert not ours.mask_token.any()


def test_way_to_timm_and_back_changes_more_than_the_mask_token() -> None:
    for kind in ("plain", "gated"):
        state = backbone(kind).state_dict()
        again = from_timm(to_timm(state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state if name != "mask_token")


def test_dinov2_weights_are_renamed() -> None:
    state = backbone("registers").state_dict()
    again, library = as_dinov2(state)
    assert library == "dinov2"
    assert all(again[name] is tensor for name, tensor in state.items())


def test_part_without_counterpart_is_dropped() -> None:
    state = to_transformers(backbone("plain").state_dict())
    with pytest.raises(ValueError, match="no counterpart in a DINOv2 backbone: pooler.dense.weight"):
        from_transformers(state | {"pooler.dense.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="dino_head.x has no counterpart"):
        to_transformers({"dino_head.x": torch.zeros(1)})
