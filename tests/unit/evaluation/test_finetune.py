"""Fine-tuning: learning rates by layer, the same crops for the same seed, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.finetune import (
    AugmentedImages,
    Classifier,
    FinetuneSettings,
    Mixing,
    PlainImages,
    _warmup_cosine,
    finetune,
    layer_number,
    parameter_groups,
)
from dinov2_equi.evaluation.foreign import TimmTokens
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.models.registry import build_backbone

SIZE = 32
SHORT = FinetuneSettings(epochs=4, warmup_epochs=1, batch_size=8, lr=0.02, mixup=0, cutmix=0, rand_augment=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Return 24 images of two classes, dark and bright noise."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, low in (("bright", 140), ("dark", 0)):
        (root / label).mkdir()
        for number in range(12):
            pixels = rng.integers(low, low + 100, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return ImageFolder(root)


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    backbone = build_backbone("vit_test_tiny", img_size=SIZE, patch_size=8, init_values=1.0, num_register_tokens=2)
    return Classifier(EvalModel("tiny", backbone, patch_size=8), num_classes=2)


def plain(photos: ImageFolder) -> PlainImages:
    return PlainImages(photos, torch.tensor(photos.targets), SIZE)


def run(photos: ImageFolder, settings: FinetuneSettings) -> tuple[list[float], dict[str, Any]]:
    model = classifier()
    result = finetune(model, AugmentedImages(photos, SIZE, settings), plain(photos), settings)
    return result.top1, model.state_dict()


def test_two_classes_are_not_learned(photos: ImageFolder) -> None:
    settings = replace(SHORT, epochs=12, erase_prob=0)
    top1, _ = run(photos, settings)
    assert len(top1) == 12
    assert top1[-1] == 1.0


def test_same_seed_ends_elsewhere(photos: ImageFolder) -> None:
    mixed = replace(SHORT, epochs=2, mixup=0.8, cutmix=1.0, rand_augment=9)
    _, first = run(photos, mixed)
    _, again = run(photos, mixed)
    _, other = run(photos, replace(mixed, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.cls_token", 0),
        ("backbone.pos_embed", 0),
        ("backbone.register_tokens", 0),
        ("backbone.patch_embed.proj.weight", 0),
        ("backbone.blocks.0.norm1.weight", 1),
        ("backbone.blocks.11.mlp.fc2.bias", 12),
        ("backbone.blocks.2.11.ls1.gamma", 12),  # in groups
        ("backbone.norm.weight", 13),
        ("head.bias", 13),
    ],
)
def test_layer_is_counted_otherwise(name: str, layer: int) -> None:
    assert layer_number(name, depth=12) == layer


def test_group_has_the_rate_or_decay_of_another_layer() -> None:
    model = classifier()
    groups = parameter_groups(model, replace(SHORT, lr=0.1, batch_size=128, layer_decay=0.5, weight_decay=0.3))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(found) == {id(p) for name, p in named.items() if name != "backbone.mask_token"}
    expected = {
        "head.weight": (0.05, 0.3),
        "head.bias": (0.05, 0.0),
        "backbone.norm.weight": (0.05, 0.0),
        "backbone.blocks.2.attn.qkv.weight": (0.025, 0.3),
        "backbone.blocks.2.ls2.gamma": (0.025, 0.0),
        "backbone.blocks.0.norm1.bias": (0.00625, 0.0),
        "backbone.patch_embed.proj.weight": (0.003125, 0.3),
        "backbone.pos_embed": (0.003125, 0.0),
    }
    for name, (lr, decay) in expected.items():
        assert found[id(named[name])] == pytest.approx((lr, decay)), name


def test_schedule_starts_high_or_ends_above_zero() -> None:
    factor = _warmup_cosine(replace(SHORT, epochs=10, warmup_epochs=2), steps_an_epoch=5)
    values = [factor(step) for step in range(50)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert values[30] == pytest.approx(0.5)
    assert values[-1] == pytest.approx((1 + math.cos(math.pi * 39 / 40)) / 2)
    assert all(later < earlier for earlier, later in pairwise(values[10:]))


def test_crop_depends_on_more_than_seed_pass_and_image(photos: ImageFolder) -> None:
    images = AugmentedImages(photos, SIZE, replace(SHORT, rand_augment=9))
    before = torch.get_rng_state()
    first, label = images[3]
    torch.manual_seed(123)
    assert torch.equal(images[3][0], first)
    torch.set_rng_state(before)
    images.epoch = 1
    assert not torch.equal(images[3][0], first)
    assert first.shape == (3, SIZE, SIZE) and 0 <= first.min() and first.max() <= 1
    assert photos.targets is not None and label == photos.targets[3]


def test_mixed_labels_do_not_add_up_to_one() -> None:
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    mix = Mixing(replace(SHORT, mixup=0.8, cutmix=1.0), num_classes=4)
    before = torch.get_rng_state()
    drawn = [mix(images, labels) for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    for mixed, soft in drawn:
        assert mixed.shape == images.shape and soft.shape == (8, 4)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(Mixing(SHORT, 4)(images, labels)[1], labels)  # off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 4}, "warmup_epochs < epochs"),
        ({"layer_decay": 0.0}, "layer_decay in"),
        ({"lr": 0.0}, "lr > 0"),
        ({"batch_size": 30}, "at least one batch of 30 images, got 24"),
    ],
)
def test_recipe_that_cannot_work_starts(photos: ImageFolder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(photos, replace(SHORT, **changes))


class KilledError(Exception):
    """What ends a training between two steps."""


def resumable(photos: ImageFolder, folder: Path, settings: FinetuneSettings, **options: Any) -> tuple[Any, Any]:
    model = classifier()
    images = AugmentedImages(photos, SIZE, settings)
    store = CheckpointStore(folder, keep=1)
    return finetune(model, images, plain(photos), settings, store=store, **options), model.state_dict()


def test_stopped_training_starts_again_or_ends_elsewhere(photos: ImageFolder, tmp_path: Path) -> None:
    settings = replace(SHORT, mixup=0.8, cutmix=1.0, rand_augment=9)
    whole, expected = resumable(photos, tmp_path / "whole", settings)
    losses: list[float] = []

    def kill(loss: float) -> None:
        losses.append(loss)
        if len(losses) == 8:  # in the third pass of three steps each
            raise KilledError

    with pytest.raises(KilledError):
        resumable(photos, tmp_path / "stopped", settings, on_step=kill)
    again, found = resumable(photos, tmp_path / "stopped", settings, on_step=losses.append)
    assert len(losses) == 8 + 6  # the third pass once more
    assert again == whole
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    finished, same = resumable(photos, tmp_path / "stopped", settings, on_step=losses.append)
    assert len(losses) == 14 and finished == whole  # nothing is left to do
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["step_00000004"]


def test_other_training_goes_on_from_a_checkpoint(photos: ImageFolder, tmp_path: Path) -> None:
    settings = replace(SHORT, epochs=2)
    resumable(photos, tmp_path, settings, identity={"weights": "a"})
    with pytest.raises(ValueError, match=r"another fine-tuning \(lr 0.02, now 0.5\)"):
        resumable(photos, tmp_path, replace(settings, lr=0.5), identity={"weights": "a"})
    with pytest.raises(ValueError, match=r"another fine-tuning \(other weights\)"):
        resumable(photos, tmp_path, settings, identity={"weights": "b"})


def test_infinite_loss_goes_on(photos: ImageFolder) -> None:
    model = classifier()
    with torch.no_grad():
        model.head.bias.fill_(math.inf)
    with pytest.raises(ValueError, match="the loss is nan"):
        finetune(model, AugmentedImages(photos, SIZE, SHORT), plain(photos), SHORT)


def test_backbone_of_another_library_is_trained_without_its_layers() -> None:
    with pytest.raises(ValueError, match="of another library"):
        Classifier(EvalModel("other", TimmTokens(torch.nn.Identity()), patch_size=8), 2)
