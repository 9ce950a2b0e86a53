"""The full ViT-S/14 gives the outputs of the official DINOv2 code on photographs."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact

# float32 sums in another order through twelve blocks; outputs are of order 1.
TOLERANCE = 1e-4

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])

RECORDED = ("dinov2_vits14", "dinov2_vits14_reg")
REPOSITORY = Path(__file__).parents[2]


class Official(NamedTuple):
    """Our model with the recorded weights, and the recorded outputs."""

    model: DinoVisionTransformer
    outputs: dict[str, np.ndarray[Any, Any]]

    def check(self, name: str, actual: Tensor) -> None:
        torch.testing.assert_close(actual, torch.from_numpy(self.outputs[name]), atol=TOLERANCE, rtol=0)

    def image(self, tag: str) -> Tensor:
        pixels = torch.from_numpy(self.outputs[f"{tag}/pixels_uint8"]).float() / 255  # [H, W, 3]
        return ((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]


def deterministic_weight(key: str, shape: list[int]) -> np.ndarray[Any, Any]:
    """Return the values of the rule written in `manifest.json`."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    z = generator.standard_normal(size=shape).astype(np.float32)
    if key.endswith(".gamma"):
        return np.float32(0.5) + np.float32(0.1) * z
    if "norm" in key and key.endswith("weight"):
        return np.float32(1) + np.float32(0.1) * z
    if key.endswith("bias"):
        return np.float32(0.05) * z
    if key in ("pos_embed", "cls_token", "register_tokens", "mask_token"):
        return np.float32(0.2) * z
    if key == "patch_embed.proj.weight":
        return np.float32(0.05) * z
    return (z / np.sqrt(shape[-1])).astype(np.float32)  # divided in float64


@pytest.fixture(scope="module", params=RECORDED)
def official(request: pytest.FixtureRequest, reference_dir: Path, official_outputs_dir: Path) -> Official:
    entry = json.loads((reference_dir / "manifest.json").read_text())[request.param]
    weights = {key: deterministic_weight(key, shape) for key, shape in entry["keys"].items()}
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].astype("<f4").tobytes())
    assert digest.hexdigest() == entry["sha256_of_concatenated_float32_le"], "the weights are not the recorded ones"
    name = request.param.replace("dinov2", "dinov2_equi")
    model: DinoVisionTransformer = torch.hub.load(str(REPOSITORY), name, source="local")  # type: ignore[no-untyped-call]
    load_exact(model, {key: torch.from_numpy(value) for key, value in weights.items()})
    with np.load(official_outputs_dir / f"{request.param}_reference.npz") as archive:
        outputs = dict(archive)
    return Official(model.eval(), outputs)


@pytest.mark.parametrize("tag", ["img0_224x224", "img1_224x224", "img0_98x154", "img1_98x154"])
@torch.no_grad()
def test_features_of_a_photograph_differ(official: Official, tag: str) -> None:
    features = official.model.forward_features(official.image(tag))
    official.check(f"{tag}/cls", features["x_norm_clstoken"][0])
    official.check(f"{tag}/patch", features["x_norm_patchtokens"][0])
    if official.model.num_register_tokens:
        official.check(f"{tag}/reg", features["x_norm_regtokens"][0])


@torch.no_grad()
def test_features_at_the_size_of_the_position_embedding_differ(official: Official) -> None:
    tag = "img0_518x518"
    features = official.model.forward_features(official.image(tag))
    stride = int(official.outputs[f"{tag}/patch_stride"])
    official.check(f"{tag}/cls", features["x_norm_clstoken"][0])
    official.check(f"{tag}/patch", features["x_norm_patchtokens"][0, ::stride])


@torch.no_grad()
def test_intermediate_layers_of_a_photograph_differ(official: Official) -> None:
    tag = "img0_224x224"
    layers = official.model.get_intermediate_layers(official.image(tag), n=4, return_class_token=True)
    for index, (patches, class_token) in zip(range(8, 12), layers, strict=True):
        official.check(f"{tag}/layer{index}_cls", class_token[0])
        official.check(f"{tag}/layer{index}_patch_first8", patches[0, :8])


@torch.no_grad()
def test_features_of_a_masked_photograph_differ(official: Official) -> None:
    tag = "img1_224x224"
    mask = torch.from_numpy(official.outputs[f"{tag}/mask"]).unsqueeze(0)  # [1, N]
    features = official.model.forward_features(official.image(tag), mask)
    official.check(f"{tag}/masked_cls", features["x_norm_clstoken"][0])
    official.check(f"{tag}/masked_patch_first32", features["x_norm_patchtokens"][0, :32])
