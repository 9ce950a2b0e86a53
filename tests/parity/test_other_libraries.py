"""ViT-S/14 at 518 pixels, the size of its position embedding, against transformers and timm with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_equi.hub.backbones import ENTRY_POINTS
from dinov2_equi.models.layouts import as_dinov2, to_timm, to_transformers
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact

SIZE = 518
TOLERANCE = 1e-4  # float32 sums in another order through twelve blocks; outputs are of order 1


@pytest.fixture(scope="module", params=["", "_reg"])
def ours(request: pytest.FixtureRequest) -> DinoVisionTransformer:
    """Return the network with random weights, none of them 0 or 1."""
    torch.manual_seed(0)
    model = ENTRY_POINTS[f"dinov2_equi_vits14{request.param}"]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def check(ours: DinoVisionTransformer, x: Tensor, tokens: Tensor) -> None:
    features = ours.forward_features(x)
    torch.testing.assert_close(tokens[:, 0], features["x_norm_clstoken"], rtol=0, atol=TOLERANCE)
    patches = tokens[:, 1 + ours.num_register_tokens :]
    torch.testing.assert_close(patches, features["x_norm_patchtokens"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_transformers_differs(
    ours: DinoVisionTransformer, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers: Any = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if ours.num_register_tokens else "Dinov2"
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": SIZE}
    getattr(transformers, f"{name}Config")(**sizes, patch_size=14).save_pretrained(tmp_path)
    save_file(to_transformers(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = getattr(transformers, f"{name}Model").from_pretrained(tmp_path).eval()
    check(ours, x, theirs(pixel_values=x).last_hidden_state)
    back, _ = as_dinov2(theirs.state_dict())
    load_exact(ours, back)
    check(ours, x, theirs(pixel_values=x).last_hidden_state)


@torch.no_grad()
def test_timm_differs(ours: DinoVisionTransformer, x: Tensor) -> None:
    timm: Any = pytest.importorskip("timm")
    name = "vit_small_patch14_reg4_dinov2" if ours.num_register_tokens else "vit_small_patch14_dinov2"
    theirs = timm.create_model(name, pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    check(ours, x, theirs.forward_features(x))
    back, _ = as_dinov2(theirs.state_dict())
    load_exact(ours, back)
    check(ours, x, theirs.forward_features(x))
