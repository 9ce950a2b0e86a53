"""Frozen features: right tokens, right normalisation, and a backbone that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi.evaluation.features import eval_mode, extract_features, extract_patch_tokens

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)


class PatchMeans(nn.Module):
    """Class token: the channel means of the image. Patch tokens: those of its left and right half, times (1, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.seen: list[int] = []

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(len(x))
        left, right = x.chunk(2, dim=-1)
        patches = torch.stack([left.mean((-2, -1)), 3 * right.mean((-2, -1))], dim=1)
        return {"x_norm_clstoken": self.dropout(x.mean((-2, -1))), "x_norm_patchtokens": patches}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def extract(backbone: nn.Module, images: object, **kwargs: object) -> Tensor:
    return extract_features(backbone, images, mean=MEAN, std=STD, device="cpu", **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("select", ["cls", "patch_mean", "both"])
def test_features_equal_a_plain_loop(images: Tensor, select: str) -> None:
    expected = []
    for image in images:
        normalized = torch.stack([(image[c] - MEAN[c]) / STD[c] for c in range(3)])
        cls = [normalized[c].mean() for c in range(3)]
        patch_mean = [(normalized[c, :, :3].mean() + 3 * normalized[c, :, 3:].mean()) / 2 for c in range(3)]
        expected.append({"cls": cls, "patch_mean": patch_mean, "both": cls + patch_mean}[select])
    # 1e-6: float32 means over 24 numbers in another order.
    torch.testing.assert_close(extract(PatchMeans(), images, select=select), torch.tensor(expected), atol=1e-6, rtol=0)


def test_channels_keep_the_same_slice_of_both_kinds_of_token(images: Tensor) -> None:
    whole = extract(PatchMeans(), images, select="both")
    part = extract(PatchMeans(), images, select="both", channels=slice(1, 3))
    assert torch.equal(part, whole[:, [1, 2, 4, 5]])


def test_batches_are_cut_to_size_and_results_do_not_depend_on_it(images: Tensor) -> None:
    backbone = PatchMeans()
    whole = extract(backbone, images, batch_size=5)
    uneven = extract(backbone, iter([images[:1], images[1:1], images[1:]]), batch_size=3)
    assert backbone.seen == [5, 1, 3, 1]
    assert torch.equal(whole, uneven)


def test_a_training_backbone_stays_in_training_with_its_frozen_part_frozen(images: Tensor) -> None:
    backbone = PatchMeans().train()
    backbone.frozen.eval()
    extract(backbone, images)
    assert backbone.training and backbone.dropout.training and not backbone.frozen.training


def test_modes_are_restored_when_the_backbone_fails() -> None:
    backbone = PatchMeans().train()
    with pytest.raises(RuntimeError, match="broken"), eval_mode(backbone):
        raise RuntimeError("broken")
    assert backbone.training and torch.is_grad_enabled()


def test_features_can_be_trained_on(images: Tensor) -> None:
    features = extract(PatchMeans(), images)
    weight = torch.zeros(features.shape[1], requires_grad=True)
    torch.autograd.backward((features @ weight).sum())
    torch.testing.assert_close(weight.grad, features.sum(dim=0))


def test_patch_tokens_come_whole(images: Tensor) -> None:
    tokens = extract_patch_tokens(PatchMeans(), images, mean=MEAN, std=STD, device="cpu", batch_size=2)
    assert tokens.shape == (5, 2, 3)
    torch.testing.assert_close(tokens.mean(dim=1), extract(PatchMeans(), images, select="patch_mean"))


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (torch.rand(2, 3, 4, 4), {"select": "class"}, "cls, patch_mean, both"),
        (torch.rand(3, 4, 4), {}, r"\[3, 4, 4\]"),
        (torch.rand(2, 1, 4, 4), {}, "these have 1"),
        ([], {}, "at least one image"),
        (torch.rand(2, 3, 4, 4), {"batch_size": 0}, "batch_size"),
    ],
)
def test_faulty_input_is_named(images: object, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(PatchMeans(), images, **kwargs)
