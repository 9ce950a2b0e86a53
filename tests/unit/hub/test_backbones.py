from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_equi.equi.feature_split import FeatureSplit, split_record
from dinov2_equi.hub import backbones
from dinov2_equi.hub.backbones import build_hub_backbone
from dinov2_equi.hub.download import sha256_of_file
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer

REPOSITORY = Path(__file__).parents[3]
Server = Any  # see conftest.py

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


def ours(name: str) -> backbones.EntryPoint:
    return backbones.ENTRY_POINTS[name]


def test_torch_hub_needs_more_than_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IMPORT_WITHOUT_THEM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", ["", "_reg"])
@pytest.mark.parametrize("name", [f"dinov2_equi_vit{size}{patch}" for size in "sblg" for patch in (14, 16)])
def test_torch_hub_does_not_find_an_entry_point(name: str, suffix: str) -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(REPOSITORY), name + suffix, source="local", img_size=112)
    assert model.num_register_tokens == (4 if suffix else 0)
    assert model.interpolate_antialias == bool(suffix)
    assert model.pos_embed.shape[1] == 1 + (112 // model.patch_size) ** 2


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(("size", "width"), [("s", 384), ("b", 768), ("l", 1024), ("g", 1536)])
def test_an_entry_point_builds_another_model(size: str, width: int, patch: int) -> None:
    with torch.device("meta"):
        model = ours(f"dinov2_equi_vit{size}{patch}")()
    assert model.embed_dim == width
    assert model.patch_size == patch
    assert ("blocks.0.mlp.w12.weight" in model.state_dict()) == (size == "g")
    assert "blocks.0.ls1.gamma" in model.state_dict()


def test_pretrained_without_weights_gives_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backbones.BASE_ADDRESS, raising=False)
    with pytest.raises(ValueError, match="no published weights exist yet.*weights=PATH"):
        ours("dinov2_equi_vits14")(pretrained=True)


def test_arguments_do_not_reach_the_model() -> None:
    model = ours("dinov2_equi_vits16")(img_size=32, num_register_tokens=2, block_chunks=4, init_values=None)
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
    with pytest.raises(ValueError, match="do not fit EquiVisionTransformer; missing: blocks"):
        ours("dinov2_equi_vits16")(weights=path)


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


# -------------------------------------------------------------------------------------------------- published weights


def publish(server: Server, path: Path, *, sha256: str | None = None, name: str = "dinov2_equi_vits14") -> None:
    """Put a file and its index on the server."""
    shutil.copy(path, server.folder / "w.pth")
    entry = {"file": "w.pth", "sha256": sha256 or sha256_of_file(path)}
    (server.folder / "index.json").write_text(json.dumps({name: entry}))


def test_weights_at_an_address_are_fetched_at_every_call(
    server: Server, hub_cache: Path, tmp_path: Path, trained: DinoVisionTransformer
) -> None:
    publish(server, save_teacher(tmp_path / "teacher.pth", trained))
    digest = sha256_of_file(server.folder / "w.pth")
    for _ in range(2):
        model = build_hub_backbone("vit_test_tiny", 16, weights=f"{server.address}/w.pth", sha256=digest)
    assert torch.equal(model.pos_embed, trained.pos_embed)
    assert server.asked == ["/w.pth"]
    assert [path.name.split("_", 1)[1] for path in hub_cache.iterdir()] == ["w.pth"]


def test_pretrained_weights_come_from_elsewhere_than_the_base_address(
    server: Server, hub_cache: Path, tmp_path: Path, trained: DinoVisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, save_teacher(tmp_path / "teacher.pth", trained))
    monkeypatch.setenv(backbones.BASE_ADDRESS, f"{server.address}/")
    path = backbones.published_weights("dinov2_equi_vits14")
    assert path.read_bytes() == (server.folder / "w.pth").read_bytes()
    with pytest.raises(ValueError, match="do not fit EquiVisionTransformer"):  # a tiny network stands in
        ours("dinov2_equi_vits16")(weights=path)
    with pytest.raises(ValueError, match="no weights for dinov2_equi_vitb14; it has dinov2_equi_vits14"):
        ours("dinov2_equi_vitb14")(pretrained=True)


def test_a_damaged_download_is_loaded(
    server: Server, hub_cache: Path, tmp_path: Path, trained: DinoVisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, save_teacher(tmp_path / "teacher.pth", trained), sha256="0" * 64)
    monkeypatch.setenv(backbones.BASE_ADDRESS, server.address)
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]{64}, expected 0{64}.*Delete it"):
        ours("dinov2_equi_vits14")(pretrained=True)


def test_without_network_there_is_a_traceback_of_the_library(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backbones.BASE_ADDRESS, "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(OSError, match=r"cannot read http://127\.0\.0\.1:9/index\.json.*check the address"):
        ours("dinov2_equi_vits14")(pretrained=True)
    with pytest.raises(OSError, match=r"cannot download http://127\.0\.0\.1:9/w\.pth.*put that file at"):
        build_hub_backbone("vit_test_tiny", 16, weights="http://127.0.0.1:9/w.pth")


def test_weights_without_registers_load_into_a_model_with_them(tmp_path: Path) -> None:
    model = build_backbone("vit_test_tiny", img_size=32, patch_size=16, init_values=1.0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected weights with registers"):
        build_hub_backbone("vit_test_tiny", 16, weights=tmp_path / "w.pth", num_registers=4)


# -------------------------------------------------------------------------------------------------- split of features


@pytest.mark.parametrize("projection_dim", [None, 40])
@pytest.mark.parametrize("block", [None, 1])
@torch.no_grad()
def test_split_features_are_other_channels_than_the_branch_trained(
    tmp_path: Path, trained: DinoVisionTransformer, projection_dim: int | None, block: int | None
) -> None:
    split = FeatureSplit(48, 12, projection_dim)
    state = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    state |= {f"feature_split.{name}": tensor for name, tensor in split_record(split, block).items()}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    model = build_hub_backbone("vit_test_tiny", 16, weights=tmp_path / "teacher.pth")
    x = torch.randn(2, 3, 48, 32)
    found = model.split_features(x)
    patches, cls = trained.eval().get_intermediate_layers(x, n=1, return_class_token=True)[0]
    index = 2 if block is None else block
    equi_patches, equi_cls = trained.get_intermediate_layers(x, n=[index], return_class_token=True)[0]
    expected = (
        split.invariant(cls),
        split.invariant(patches),
        split.equivariant(equi_cls),
        split.equivariant(equi_patches),
    )
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-6)
    assert found.equivariant_patchtokens.shape == (2, 6, 12)
    assert torch.equal(model(x), trained(x))


def test_weights_without_a_split_give_parts(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    model = build_hub_backbone("vit_test_tiny", 16, weights=save_teacher(tmp_path / "teacher.pth", trained))
    with pytest.raises(ValueError, match=r"no equivariant part.*teacher_checkpoint\.pth"):
        model.split_features(torch.zeros(1, 3, 32, 32))


def test_a_split_of_an_earlier_version_is_guessed(tmp_path: Path, trained: DinoVisionTransformer) -> None:
    state = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    state |= {f"feature_split.{name}": tensor for name, tensor in FeatureSplit(48, 12, 40).state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="no equi_dim: the file is of an earlier version"):
        build_hub_backbone("vit_test_tiny", 16, weights=tmp_path / "teacher.pth")
