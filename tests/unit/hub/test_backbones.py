from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_equi.hub import backbones
from dinov2_equi.hub.backbones import build_hub_backbone
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer

REPOSITORY = Path(__file__).parents[3]

BLOCKED = ("omegaconf", "submitit", "xformers", "fvcore", "torchvision", "rich", "safetensors", "numpy")

IMPORT_WITHOUT_THEM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError("blocked: " + name)

import torch  # may use what is installed
for name in [name for name in sys.modules if name.split(".")[0] in {BLOCKED!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
import hubconf
model = hubconf.dinov2_equi_vits14(img_size=28)
assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 384)
assert not [name for name in sys.modules if name.split(".")[0] in {BLOCKED!r}]
"""


def test_torch_hub_needs_more_than_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IMPORT_WITHOUT_THEM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [f"dinov2_equi_vit{size}{patch}" for size in "sblg" for patch in (14, 16)])
def test_torch_hub_does_not_find_an_entry_point(name: str) -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(REPOSITORY), name, source="local", img_size=112)
    assert model.pos_embed.shape[1] == 1 + (112 // model.patch_size) ** 2


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(("size", "width"), [("s", 384), ("b", 768), ("l", 1024), ("g", 1536)])
def test_an_entry_point_builds_another_model(size: str, width: int, patch: int) -> None:
    with torch.device("meta"):
        model = getattr(backbones, f"dinov2_equi_vit{size}{patch}")()
    assert model.embed_dim == width
    assert model.patch_size == patch
    assert ("blocks.0.mlp.w12.weight" in model.state_dict()) == (size == "g")
    assert "blocks.0.ls1.gamma" in model.state_dict()


def test_pretrained_without_weights_gives_random_ones() -> None:
    with pytest.raises(ValueError, match="no published weights exist yet.*weights=PATH"):
        backbones.dinov2_equi_vits14(pretrained=True)


def test_arguments_do_not_reach_the_model() -> None:
    model = backbones.dinov2_equi_vits16(img_size=32, num_register_tokens=2, block_chunks=4, init_values=None)
    assert model.pos_embed.shape == (1, 5, 384)
    assert model.num_register_tokens == 2
    assert "blocks.3.11.norm1.weight" in model.state_dict()
    assert not any("gamma" in name for name in model.state_dict())


@pytest.fixture
def trained() -> DinoVisionTransformer:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"num_register_tokens": 3, "ffn_layer": "swiglu", "block_chunks": 2}
    return build_backbone("vit_test_tiny", img_size=32, patch_size=16, init_values=1e-5, **arguments)


def save_teacher(path: Path, model: DinoVisionTransformer) -> Path:
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"teacher": state | {"dino_head.mlp.0.weight": torch.zeros(1)}}, path)
    return path


def test_a_teacher_checkpoint_of_a_run_does_not_load(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    path = save_teacher(tmp_path / "teacher.pth", trained)
    model = build_hub_backbone("vit_test_tiny", 16, weights=path)
    assert not model.training
    assert model.block_chunks == 0
    x = torch.randn(1, 3, 48, 32)
    torch.testing.assert_close(model(x), trained.eval()(x), rtol=0, atol=0)


def test_weights_of_another_architecture_load(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    path = save_teacher(tmp_path / "teacher.pth", trained)
    with pytest.raises(ValueError, match="do not fit DinoVisionTransformer; missing: blocks"):
        backbones.dinov2_equi_vits16(weights=path)


def test_a_given_image_size_is_overruled_by_the_file(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    path = save_teacher(tmp_path / "teacher.pth", trained)
    with pytest.raises(ValueError, match=r"pos_embed \(expected \[1, 17, 48\], got \[1, 5, 48\]\)"):
        build_hub_backbone("vit_test_tiny", 16, weights=path, img_size=64)
