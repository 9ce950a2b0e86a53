"""The training loop of all dense tasks: it can be stopped anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.dense.maps import DenseBackbone
from dinov2_equi.evaluation.dense.training import (
    LoopSettings,
    Losses,
    TrainingSamples,
    parameter_groups,
    train,
    trained_state,
)
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import random_backbone
from dinov2_equi.fsdp.checkpoint import sha256_of_tensors

IMAGES = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Task(nn.Module):
    """A head with everything that has a state or is random: batch norm and dropout."""

    def __init__(self, *, is_frozen: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = EvalModel("tiny", random_backbone("vit_test_tiny", img_size=16, patch_size=8), patch_size=8)
            self.features = DenseBackbone(model, (2,), is_frozen=is_frozen)
            self.head = nn.Sequential(nn.BatchNorm2d(48), nn.Dropout(0.5), nn.Conv2d(48, 1, 1))

    def losses(self, images: Tensor) -> Losses:
        out = self.head(self.features(images)[0].patches)
        return {"a_loss": out.square().mean(), "b_loss": F.l1_loss(out, torch.ones_like(out))}


def load(index: int) -> Tensor:
    return (IMAGES[index] + 0.1 * torch.randn(3, 16, 16)).clamp(0, 1)


def run(
    folder: Path,
    *,
    is_frozen: bool = True,
    stop: int | None = None,
    seed: int = 0,
    workers: int = 0,
    identity: str = "x",
    save_every: int = 2,
) -> tuple[Task, list[float]]:
    task = Task(is_frozen=is_frozen)
    settings = LoopSettings(steps=6, batch_size=3, lr=0.01, warmup_steps=2, save_every=save_every, seed=seed)

    def on_step(done: int, terms: Losses) -> None:
        assert set(terms) == {"a_loss", "b_loss"}
        if done == stop:
            raise KeyboardInterrupt

    samples = TrainingSamples(load, len(IMAGES), seed)
    history = train(
        task,
        task.features.backbone,
        task.losses,
        samples,
        settings=settings,
        folder=folder,
        identity={"name": identity, "pair": (1, 2)},
        num_workers=workers,
        on_step=on_step,
    )
    return task, history


def fingerprint(task: Task) -> str:
    return sha256_of_tensors(task.state_dict())


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumed_training_ends_elsewhere(tmp_path: Path, is_frozen: bool, stop: int) -> None:
    whole, losses = run(tmp_path / "whole", is_frozen=is_frozen)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", is_frozen=is_frozen, stop=stop)
    torch.rand(3)  # the caller's random state plays no part
    again, same = run(tmp_path / "cut", is_frozen=is_frozen, save_every=5)
    assert fingerprint(whole) == fingerprint(again) and losses == same and len(losses) == 6
    assert not again.training


def test_finished_training_is_repeated(tmp_path: Path) -> None:
    first, losses = run(tmp_path)
    second, same = run(tmp_path, stop=1)  # would stop if a step were made
    assert fingerprint(first) == fingerprint(second) and losses == same


def test_loader_processes_change_the_weights(tmp_path: Path) -> None:
    first, losses = run(tmp_path / "a")
    second, same = run(tmp_path / "b", workers=1)
    assert fingerprint(first) == fingerprint(second) and losses == same


def test_seed_changes_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "a", seed=0)[1] != run(tmp_path / "b", seed=1)[1]


def test_checkpoint_of_another_training_is_taken(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"differs in name; give another --output"):
        run(tmp_path, identity="y")
    with pytest.raises(ValueError, match=r"differs in loop"):
        run(tmp_path, seed=3)


def test_frozen_backbone_moves_or_is_written(tmp_path: Path) -> None:
    before = sha256_of_tensors(Task(is_frozen=True).features.backbone.state_dict())
    task, _ = run(tmp_path)
    assert sha256_of_tensors(task.features.backbone.state_dict()) == before
    assert all(name.startswith("head.") for name in trained_state(task, task.features.backbone))
    whole = Task(is_frozen=False)
    assert trained_state(whole, whole.features.backbone).keys() == whole.state_dict().keys()


def test_learning_rates_fall_towards_the_patches() -> None:
    task = Task(is_frozen=False)
    settings = LoopSettings(steps=2, batch_size=1, lr=1.0, layer_decay=0.5, backbone_lr=0.1)
    rates = {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(task, task.features.backbone, settings)
        for name in group["names"]
    }
    assert rates["head.2.weight"] == (1.0, 1e-4) and rates["head.2.bias"] == (1.0, 0.0)
    assert rates["features.backbone.norm.weight"][0] == 0.1  # the norm belongs to the last of three blocks
    assert rates["features.backbone.blocks.2.attn.qkv.weight"] == (0.1, 1e-4)
    assert rates["features.backbone.blocks.0.attn.qkv.weight"][0] == 0.1 * 0.25
    assert rates["features.backbone.pos_embed"] == (0.1 * 0.125, 0.0)
    assert len(rates) == sum(parameter.requires_grad for parameter in task.parameters())


def test_schedule() -> None:
    settings = LoopSettings(steps=10, batch_size=1, lr=1.0, warmup_steps=4)
    assert [settings.lr_factor(step) for step in (0, 3, 4, 7)] == pytest.approx([0.25, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("change", [{"steps": 0}, {"warmup_steps": 5}, {"batch_size": 0}, {"lr": 0.0}])
def test_settings_out_of_range_are_taken(change: dict[str, float]) -> None:
    values = {"steps": 5, "batch_size": 1, "lr": 0.1} | change
    with pytest.raises(ValueError, match="expected"):
        LoopSettings(**values).check()  # type: ignore[arg-type]


def test_loss_that_is_not_finite_moves_the_weights(tmp_path: Path) -> None:
    task = Task(is_frozen=True)
    before = fingerprint(task)
    with pytest.raises(ValueError, match=r"loss of step 1 is not finite \(a_loss nan\)"):
        train(
            task,
            task.features.backbone,
            lambda batch: {"a_loss": next(task.head.parameters()).sum() * torch.nan},
            TrainingSamples(load, 7, 0),
            settings=LoopSettings(steps=1, batch_size=1, lr=0.1),
            folder=tmp_path,
            identity={},
        )
    assert fingerprint(task) == before
