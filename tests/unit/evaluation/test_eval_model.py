"""One shape for every backbone: tokens, pooled features, halves, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.evaluation.eval_model import EvalModel, default_image_size, select_features
from dinov2_equi.evaluation.features import extract_features
from dinov2_equi.models.registry import build_backbone

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
IMAGES = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("vit_test_tiny", img_size=16, patch_size=8, num_register_tokens=2, init_values=0.5)


def eval_model(backbone: nn.Module, **options: object) -> EvalModel:
    return EvalModel("tiny", backbone, patch_size=8, mean=MEAN, std=STD, **options)  # type: ignore[arg-type]


def tokens_by_hand(backbone: nn.Module, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Class token [n, D] and mean patch token [n, D], image by image; of a block through the final norm."""
    cls, mean = [], []
    for image in IMAGES:
        x = torch.stack([(image[c] - MEAN[c]) / STD[c] for c in range(3)])[None]
        with torch.no_grad():
            which = [backbone.n_blocks - 1 if block is None else block]  # type: ignore[operator]
            ((patches, token),) = backbone.eval().get_intermediate_layers(x, which, return_class_token=True)  # type: ignore[operator]
        cls.append(token[0])
        mean.append(sum(patches[0]) / patches.shape[1])
    return torch.stack(cls), torch.stack(mean)


# 1e-5 below: float32, batches of another size.


def test_tokens_are_not_those_of_the_normalised_images(backbone: nn.Module) -> None:
    tokens = eval_model(backbone).tokens(IMAGES)
    assert tokens.patches.shape == (5, 6, 48)
    cls, mean = tokens_by_hand(backbone)
    torch.testing.assert_close(tokens.cls, cls, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches.mean(dim=1), mean, atol=1e-5, rtol=0)


def test_features_differ_from_extract_features(backbone: nn.Module) -> None:
    model = eval_model(backbone)
    features = model.features(IMAGES, device="cpu", batch_size=2)
    for name in ("cls", "patch_mean", "both"):
        expected = extract_features(backbone, IMAGES, mean=MEAN, std=STD, device="cpu", select=name)
        torch.testing.assert_close(select_features(features, name), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("projection_dim", [None, 20])
@pytest.mark.parametrize("block", [None, 0, 2])
def test_halves_are_of_other_tokens(backbone: nn.Module, projection_dim: int | None, block: int | None) -> None:
    torch.manual_seed(1)
    split = FeatureSplit(48, 12, projection_dim)
    model = eval_model(backbone, split=split, split_block=block)
    features = model.features(IMAGES, device="cpu", batch_size=3)
    invariant = [split.invariant(token) for token in tokens_by_hand(backbone)]
    equivariant = [split.equivariant(token) for token in tokens_by_hand(backbone, block)]
    torch.testing.assert_close(features["invariant"], torch.cat(invariant, dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(features["equivariant"], torch.cat(equivariant, dim=1), atol=1e-5, rtol=0)
    assert features["equivariant"].shape == (5, 24)
    assert not any(tensor.requires_grad for tensor in features.values())


def test_a_backbone_without_split_claims_halves(backbone: nn.Module) -> None:
    assert eval_model(backbone).feature_names == ("cls", "patch_mean", "both")
    assert "invariant" in eval_model(backbone, split=FeatureSplit(48, 12)).feature_names
    with pytest.raises(ValueError, match="no features 'invariant'; this backbone has both, cls, patch_mean"):
        select_features(eval_model(backbone).features(IMAGES, device="cpu"), "invariant")


def test_the_mode_of_the_backbone_is_changed_for_good(backbone: nn.Module) -> None:
    backbone.train()
    eval_model(backbone).features(IMAGES, device="cpu")
    assert backbone.training


def test_passes_are_not_counted(backbone: nn.Module) -> None:
    calls: list[None] = []
    eval_model(backbone).features(IMAGES, device="cpu", batch_size=2, on_batch=lambda: calls.append(None))
    assert len(calls) == 3


def test_no_image_gives_empty_features(backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        eval_model(backbone).features(IMAGES[:0], device="cpu")


@pytest.mark.parametrize(("size", "advice"), [(20, "try 16 or 24"), (4, "try 8 or 16"), (0, "try 8 or 16")])
def test_a_size_that_cuts_patches_is_accepted(backbone: nn.Module, size: int, advice: str) -> None:
    eval_model(backbone).check_size(24)
    with pytest.raises(ValueError, match=f"multiple of its patch size 8, got {size}; {advice}"):
        eval_model(backbone).check_size(size)


@pytest.mark.parametrize(
    ("trained", "patch", "expected"), [(518, 14, 224), (512, 16, 224), (64, 8, 64), (512, 30, 210), (8, 14, 14)]
)
def test_the_default_size_holds_no_whole_patches(trained: int, patch: int, expected: int) -> None:
    assert default_image_size(trained, patch) == expected
