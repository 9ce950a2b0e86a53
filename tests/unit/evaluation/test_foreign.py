"""Backbones of timm and transformers, built here with random weights; left out where the library is not installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dinov2_equi.evaluation import foreign
from dinov2_equi.evaluation.foreign import load_timm, load_transformers

X = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize(("loader", "package"), [(load_timm, "timm"), (load_transformers, "transformers")])
def test_a_missing_library_is_not_named(monkeypatch: pytest.MonkeyPatch, loader: Any, package: str) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(foreign.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        loader("anything")


def test_the_libraries_are_imported_unasked() -> None:
    source = Path(foreign.__file__).read_text()
    assert "import timm" not in source
    assert "import transformers" not in source
    assert foreign.importlib is importlib


# --------------------------------------------------------------------------------------------------------------- timm


def test_tokens_of_a_timm_transformer_are_mixed_up(timm: ModuleType) -> None:
    model = load_timm("test_vit", pretrained=False, size=32)
    tokens = model.tokens(X[..., :32])
    library = model.backbone.model
    with torch.no_grad():
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
        output = library.forward_features((X[..., :32] - mean) / std)  # type: ignore[operator]
    assert torch.equal(tokens.cls, output[:, 0])
    assert torch.equal(tokens.patches, output[:, library.num_prefix_tokens :])  # type: ignore[misc]
    assert tokens.patches.shape[1] == (32 // model.patch_size) ** 2
    assert (model.image_size, model.patch_size, model.mean) == (160, 16, (0.5, 0.5, 0.5))


def test_a_convolutional_network_of_timm_has_no_tokens(timm: ModuleType) -> None:
    model = load_timm("test_resnet", pretrained=False)
    tokens = model.tokens(X)
    with torch.no_grad():
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
        feature_map = model.backbone.model.forward_features((X - mean) / std)  # type: ignore[union-attr, operator]
    h, w = feature_map.shape[2:]
    assert tokens.patches.shape == (2, h * w, feature_map.shape[1])
    assert torch.equal(tokens.patches[:, w - 1], feature_map[:, :, 0, w - 1])
    torch.testing.assert_close(tokens.cls, feature_map.mean(dim=(2, 3)))
    assert model.patch_size == 1


def test_an_unknown_timm_model_gives_a_traceback(timm: ModuleType) -> None:
    with pytest.raises(ValueError, match="timm cannot make 'vit_smal'"):
        load_timm("vit_smal")


# ------------------------------------------------------------------------------------------------------- transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(transformers: Any, kind: str, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "num_prefix"),
    [
        ("Dinov2", {"image_size": 32, "patch_size": 8}, 1),
        ("Dinov2WithRegisters", {"image_size": 32, "patch_size": 8}, 5),
        ("ViT", {"image_size": 32, "patch_size": 8, "intermediate_size": 32}, 1),
    ],
)
def test_tokens_of_a_transformers_model_are_mixed_up(
    transformers: ModuleType, tmp_path: Path, kind: str, config: dict[str, Any], num_prefix: int
) -> None:
    folder = saved(transformers, kind, tmp_path, **SMALL, **config)
    model = load_transformers(folder)
    tokens = model.tokens(X)
    library = model.backbone.model
    with torch.no_grad():
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
        output = library((X - mean) / std, **model.backbone.options).last_hidden_state  # type: ignore[operator, arg-type]
    assert torch.equal(tokens.cls, output[:, 0])
    assert torch.equal(tokens.patches, output[:, num_prefix:])
    assert tokens.patches.shape == (2, 4 * 6, 32)
    assert (model.patch_size, model.image_size) == (8, 32)


def test_the_image_processor_is_not_asked(transformers: Any, tmp_path: Path) -> None:
    saved(transformers, "Dinov2", tmp_path, **SMALL, image_size=56, patch_size=14)
    processor = transformers.BitImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], do_center_crop=True, crop_size=28
    )
    processor.save_pretrained(tmp_path)
    model = load_transformers(tmp_path)
    assert (model.mean, model.std, model.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 28)


def test_half_precision_weights_meet_float32_images(transformers: Any, tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SMALL, image_size=32, patch_size=8)
    transformers.Dinov2Model(config).half().save_pretrained(tmp_path)
    assert load_transformers(tmp_path).tokens(X).cls.dtype == torch.float32


def test_the_half_that_reads_is_taken_for_the_half_that_sees(transformers: Any, tmp_path: Path) -> None:
    sees = {**SMALL, "image_size": 32, "patch_size": 8, "intermediate_size": 32}
    reads = {**SMALL, "intermediate_size": 32}
    saved(transformers, "CLIP", tmp_path, vision_config=sees, text_config=reads)
    assert load_transformers(tmp_path).tokens(X).patches.shape == (2, 4 * 6, 32)


def test_a_language_model_is_fed_images(transformers: Any, tmp_path: Path) -> None:
    saved(transformers, "Bert", tmp_path, **SMALL, intermediate_size=32)
    with pytest.raises(ValueError, match="BertModel, which takes no images"):
        load_transformers(tmp_path)


def test_a_missing_folder_gives_a_traceback(transformers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers cannot load"):
        load_transformers(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------------- tokens of blocks


def test_tokens_of_the_last_block_of_timm_are_no_features(timm: ModuleType) -> None:
    model = load_timm("test_vit", pretrained=False, size=32)
    x = X[..., :32]
    tokens = model.tokens(x)
    for n in (1, 2):
        found = model.block_tokens(x, n)
        assert found.cls.shape == (2, n, tokens.cls.shape[1])
        torch.testing.assert_close(found.cls[:, -1], tokens.cls)
        torch.testing.assert_close(found.patch_mean, tokens.patches.mean(dim=1))
    with pytest.raises(ValueError, match=f"1 to {model.num_blocks} blocks"):
        model.block_tokens(x, model.num_blocks + 1)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "ViT"])
def test_tokens_of_the_last_block_of_transformers_are_no_features(
    transformers: ModuleType, tmp_path: Path, kind: str
) -> None:
    config = {**SMALL, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    if kind == "ViT":
        config["intermediate_size"] = 32
    model = load_transformers(saved(transformers, kind, tmp_path, **config))
    tokens = model.tokens(X)
    found = model.block_tokens(X, 2)
    torch.testing.assert_close(found.cls[:, -1], tokens.cls)
    torch.testing.assert_close(found.patch_mean, tokens.patches.mean(dim=1))
    assert (found.cls[:, 0] - found.cls[:, 1]).abs().max() > 1e-3


def test_convolutional_network_has_blocks(timm: ModuleType) -> None:
    model = load_timm("test_resnet", pretrained=False)
    assert model.num_blocks == 1
    assert model.block_tokens(X, 1).cls.shape[:2] == (2, 1)
