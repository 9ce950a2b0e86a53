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


@pytest.mark.parametrize(
    "options", [{"init_values": None}, {"init_values": 0.5, "qkv_bias": False, "proj_bias": False, "ffn_bias": False}]
)
def test_weights_without_layer_scale_or_biases_do_not_load(tmp_path: Path, options: dict[str, Any]) -> None:
    model = build_backbone("vit_test_tiny", img_size=32, patch_size=16, **options).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = build_hub_backbone("vit_test_tiny", 16, weights=tmp_path / "weights.pth")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_weights_of_another_patch_size_are_not_named(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    path = save_teacher(tmp_path / "teacher.pth", trained)
    with pytest.raises(ValueError, match=r"patches of 14 pixels, .*teacher\.pth has 16"):
        build_hub_backbone("vit_test_tiny", 14, weights=path)


# ------------------------------------------------------------------------------------------------------------ released


def test_a_released_name_of_dinov2_is_missing() -> None:
    sizes = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
    expected = {f"dinov2_vit{size}14": (arch, 0) for size, arch in sizes.items()}
    expected |= {f"dinov2_vit{size}14_reg": (arch, 4) for size, arch in sizes.items()}
    assert expected == backbones.RELEASED


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache of `torch.hub`, empty, with two tiny stand-ins for released backbones."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    tiny = {"dinov2_tiny14": ("vit_test_tiny", 0), "dinov2_tiny14_reg": ("vit_test_tiny", 4)}
    monkeypatch.setattr(backbones, "RELEASED", tiny)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("name", "num_registers", "file"),
    [
        ("dinov2_tiny14", 0, "dinov2_tiny14/dinov2_tiny14_pretrain.pth"),
        ("dinov2_tiny14_reg", 4, "dinov2_tiny14/dinov2_tiny14_reg4_pretrain.pth"),
    ],
)
def test_released_weights_are_downloaded_twice_or_interpolated_otherwise(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_registers: int, file: str
) -> None:
    model = build_backbone(
        "vit_test_tiny", img_size=28, patch_size=14, num_register_tokens=num_registers, init_values=1.0
    )
    urls = []

    def download(url: str, path: str, progress: bool) -> None:
        urls.append(url)
        torch.save(model.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        loaded = backbones.released_dinov2(name)
    assert urls == [f"https://dl.fbaipublicfiles.com/dinov2/{file}"]
    assert (hub_folder / file.rsplit("/", 1)[-1]).is_file()
    assert not loaded.training
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    expected = (0.0, True) if num_registers else (0.1, False)
    assert (loaded.interpolate_offset, loaded.interpolate_antialias) == expected


def test_a_failed_download_does_not_say_where_the_file_belongs(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, path: str, progress: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match=r"no route to host.*dinov2_tiny14_pretrain\.pth yourself"):
        backbones.released_dinov2("dinov2_tiny14")
    assert not any(hub_folder.iterdir())


def test_an_unknown_released_name_is_not_explained() -> None:
    with pytest.raises(ValueError, match="no released backbone 'dinov2_vits16'; did you mean 'dinov2_vits14'"):
        backbones.released_dinov2("dinov2_vits16")
