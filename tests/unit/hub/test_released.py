"""What DINOv2 released, by its own names: backbones and linear classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.hub import released
from dinov2_equi.hub.released import ENTRY_POINTS, LinearClassifier, released_dinov2
from dinov2_equi.models.registry import build_backbone

REPOSITORY = Path(__file__).parents[3]
TINY = {"dinov2_tiny14": ("vit_test_tiny", 0), "dinov2_tiny14_reg": ("vit_test_tiny", 4)}


def test_a_released_name_of_dinov2_is_missing() -> None:
    sizes = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
    expected = {f"dinov2_vit{size}14": (arch, 0) for size, arch in sizes.items()}
    expected |= {f"dinov2_vit{size}14_reg": (arch, 4) for size, arch in sizes.items()}
    assert expected == released.RELEASED
    assert set(ENTRY_POINTS) == {f"{name}{suffix}" for name in expected for suffix in ("", "_lc")}


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitl14_reg", "dinov2_vits14_reg_lc"])
def test_torch_hub_does_not_find_a_name_of_dinov2(name: str) -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(REPOSITORY), name, source="local", pretrained=False)
    backbone = model.backbone if name.endswith("_lc") else model
    assert backbone.num_register_tokens == (4 if "_reg" in name else 0)
    assert backbone.pos_embed.shape[1] == 37 * 37 + 1


@pytest.fixture
def served(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Stand-ins for released files, by the end of their address; what was fetched is under "asked"."""
    monkeypatch.setattr(released, "RELEASED", TINY)
    files: dict[str, Any] = {"asked": []}
    for name, (arch, registers) in TINY.items():
        torch.manual_seed(registers)
        model = build_backbone(arch, img_size=28, patch_size=14, num_register_tokens=registers, init_values=1.0)
        file = f"dinov2_tiny14{'_reg4' if registers else ''}"
        files[f"{file}_pretrain.pth"] = model.state_dict()
        for layers, part in ((1, "linear_head"), (4, "linear4_head")):
            head = torch.nn.Linear((1 + layers) * model.embed_dim, 1000)
            files[f"{file}_{part}.pth"] = head.state_dict()
        files[name] = model.eval()

    def download(url: str, path: str, progress: bool) -> None:
        files["asked"].append(url)
        torch.save(files[url.rsplit("/", 1)[-1]], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return files


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2_tiny14", "dinov2_tiny14/dinov2_tiny14_pretrain.pth"),
        ("dinov2_tiny14_reg", "dinov2_tiny14/dinov2_tiny14_reg4_pretrain.pth"),
    ],
)
def test_released_weights_are_downloaded_twice_or_interpolated_otherwise(
    served: dict[str, Any], hub_cache: Path, name: str, file: str
) -> None:
    for _ in range(2):
        loaded = released_dinov2(name)
    assert served["asked"] == [f"https://dl.fbaipublicfiles.com/dinov2/{file}"]
    assert (hub_cache / file.rsplit("/", 1)[-1]).is_file()
    assert not loaded.training
    assert torch.equal(loaded.pos_embed, served[name].pos_embed)
    expected = (0.0, True) if name.endswith("_reg") else (0.1, False)
    assert (loaded.interpolate_offset, loaded.interpolate_antialias) == expected


@pytest.mark.parametrize("name", TINY)
def test_classifier_reads_other_tokens_than_dinov2(served: dict[str, Any], name: str) -> None:
    model = released._classifier_entry(name)(layers=1)
    head = served[f"dinov2_tiny14{'_reg4' if name.endswith('_reg') else ''}_linear_head.pth"]
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features = served[name].forward_features(x)
        tokens = torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(dim=1)], dim=1)
        expected = tokens @ head["weight"].T + head["bias"]
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert not model.training


def test_classifier_of_four_blocks_has_another_file(served: dict[str, Any]) -> None:
    model = released._classifier_entry("dinov2_tiny14_reg")()
    assert served["asked"][-1].endswith("/dinov2_tiny14/dinov2_tiny14_reg4_linear4_head.pth")
    assert torch.equal(model.linear_head.weight, served["dinov2_tiny14_reg4_linear4_head.pth"]["weight"])


@torch.no_grad()
def test_four_class_tokens_stand_in_the_order_of_the_blocks() -> None:
    torch.manual_seed(0)
    backbone = released.build_hub_backbone("vit_micro", 14, img_size=28).eval()
    model = LinearClassifier(backbone, layers=4, num_classes=7)
    x = torch.randn(1, 3, 28, 28)
    layers = backbone.get_intermediate_layers(x, n=[2, 3, 4, 5], return_class_token=True)
    tokens = torch.cat([cls for _, cls in layers] + [layers[-1][0].mean(dim=1)], dim=1)
    torch.testing.assert_close(model(x), model.linear_head(tokens), rtol=0, atol=1e-6)


def test_classifier_of_another_depth_is_built() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="layers 1 or 4.*got 2"):
        ENTRY_POINTS["dinov2_vits14_lc"](pretrained=False, layers=2)


def test_weights_of_ones_own_are_not_read(served: dict[str, Any], tmp_path: Path) -> None:
    torch.save(served["dinov2_tiny14"].state_dict(), tmp_path / "own.pth")
    loaded = released._backbone_entry("dinov2_tiny14")(weights=tmp_path / "own.pth")
    assert torch.equal(loaded.pos_embed, served["dinov2_tiny14"].pos_embed)
    assert served["asked"] == []


def test_a_failed_download_does_not_say_where_the_file_belongs(
    served: dict[str, Any], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, path: str, progress: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match=r"no route to host.*dinov2_tiny14_pretrain\.pth yourself"):
        released_dinov2("dinov2_tiny14")
    assert not any(hub_cache.iterdir())


def test_an_unknown_released_name_is_not_explained() -> None:
    with pytest.raises(ValueError, match="no released backbone 'dinov2_vits16'; did you mean 'dinov2_vits14'"):
        released_dinov2("dinov2_vits16")
