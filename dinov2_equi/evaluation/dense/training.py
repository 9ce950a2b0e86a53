"""Training of what stands on a backbone: one loop for all dense tasks, and it goes on where it was stopped.

Which images a step sees, how they are changed and every random number of the step depend on (seed, step) alone, so a
resumed training gives the weights of one that was never stopped. Several processes divide the images of each step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2_equi.data.samplers import RandomStream, SampleOrder, random_generator
from dinov2_equi.distributed.collectives import (
    all_reduce_mean,
    average_gradients_,
    largest_of_ranks,
    wait_for_all_ranks,
)
from dinov2_equi.distributed.env import get_rank, is_main_process
from dinov2_equi.evaluation.finetune import layer_number
from dinov2_equi.evaluation.step_loader import step_loader
from dinov2_equi.fsdp.checkpoint import CheckpointStore, flatten_optimizer, restore_optimizer_

CHECKPOINTS = "checkpoints"
_NO_DECAY = re.compile(r"(bias|gamma|cls_token|pos_embed|register_tokens|(query|level)_(embed|feat)\.weight)$|norm")

WITHOUT_EFFECT = ("save_every", "curve_every")
"""Settings that do not change the weights: a training that was stopped goes on with others."""

Losses = Mapping[str, Tensor]
"""Terms by name; their sum is minimised. Of several processes the mean is: a term that is no mean over images of equal
weight has to be computed from sums over all processes (`sum_over_ranks`), and is then the same on each."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast; the settings of a task are this class with more.

    Attributes:
        steps: of the optimiser.
        batch_size: images in a step, of all processes together.
        lr: learning rate of the head, after the warm-up; then it falls along a cosine to 0.
        warmup_steps: in which it rises from 0.
        weight_decay: of matrices; biases, norms and tokens have none.
        layer_decay: of a backbone that is trained on: factor of the learning rate from one block to the one before it.
        backbone_lr: of its last block, as a share of `lr`.
        clip_grad: largest norm of the gradient; 0: not clipped.
        save_every: steps between two checkpoints.
        seed: of everything random.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    layer_decay: float = 0.65
    backbone_lr: float = 0.1
    clip_grad: float = 0.0
    save_every: int = 200
    seed: int = 0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"expected 0 <= warmup_steps < steps, got {self.warmup_steps} and {self.steps}")
        if self.batch_size < 1 or self.save_every < 1 or self.seed < 0:
            raise ValueError(
                f"expected batch_size >= 1, save_every >= 1 and seed >= 0, got {self.batch_size}, {self.save_every}, "
                f"{self.seed}"
            )
        if self.lr <= 0 or not 0 < self.layer_decay <= 1 or self.backbone_lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"expected lr > 0, backbone_lr > 0, weight_decay >= 0 and layer_decay in (0, 1], got {self.lr}, "
                f"{self.backbone_lr}, {self.weight_decay}, {self.layer_decay}"
            )

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate in a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps))) / 2


class TrainingSamples(Dataset[Any]):
    """The samples of a training by their position in it, augmented.

    Args:
        load: returns sample `index`, augmented with the random numbers of torch.
        num_samples: in the data set.
        seed: of order and augmentation.
    """

    def __init__(self, load: Callable[[int], Any], num_samples: int, seed: int) -> None:
        self._load = load
        self._order = SampleOrder(num_samples, seed)
        self._seed = seed

    def __getitem__(self, position: int) -> Any:
        """Return the sample at a position: the images of all steps, counted from 0."""
        seed = int(random_generator(RandomStream.AUGMENTATION, self._seed, position).integers(2**62))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._load(self._order.index(position))


def parameter_groups(module: nn.Module, backbone: nn.Module, settings: LoopSettings) -> list[dict[str, Any]]:
    """Return groups for AdamW of all parameters that want gradients, with their names.

    Args:
        module: what is trained, the backbone in it.
        backbone: has learning rates by block; the rest has the full one.
        settings: the recipe.
    """
    depth = int(getattr(backbone, "n_blocks", 1))
    of_backbone = {id(parameter): name for name, parameter in backbone.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = settings.lr
        if id(parameter) in of_backbone:
            layer = min(layer_number(f"backbone.{of_backbone[id(parameter)]}", depth), depth)
            lr *= settings.backbone_lr * settings.layer_decay ** (depth - layer)
        decay = 0.0 if parameter.ndim < 2 or _NO_DECAY.search(name) else settings.weight_decay
        group = groups.setdefault((lr, decay), {"params": [], "names": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def trained_state(module: nn.Module, backbone: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a module but those of a frozen backbone in it."""
    is_frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
    left_out = {id(value) for value in backbone.state_dict(keep_vars=True).values()} if is_frozen else set()
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) not in left_out}


def train(
    module: nn.Module,
    backbone: nn.Module,
    losses_of: Callable[[Any], Losses],
    samples: Dataset[Any],
    *,
    settings: LoopSettings,
    folder: Path,
    identity: Mapping[str, Any],
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    on_step: Callable[[int, Losses], None] | None = None,
    after_save: Callable[[int], None] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train a module, or go on with a training that was stopped, and return the loss of every step.

    Every process of a group must call it; the first one writes the checkpoints.

    Args:
        module: changed in place; its weights live on the device where it is to be trained. In evaluation mode after it.
        backbone: the part that may be frozen; a frozen one is not written.
        losses_of: returns the terms of the loss for a batch, which it puts on the device.
        samples: of the whole training, by position in it, such as `TrainingSamples`.
        settings: the recipe.
        folder: checkpoints go to `checkpoints` in it.
        identity: what the training depends on beside its settings, as JSON: a checkpoint of another one is refused.
        num_workers: processes that load samples.
        collate: makes a batch of samples; None: torch's own.
        on_step: called after each step with the number of steps done and the terms.
        after_save: called with the number of steps done once what is due after a step is written, in every process; not
            after the last one, nor where all stop. A training that goes on begins with a call for the steps done.
        asked_to_stop: asked after each step; where a process answers yes, all save and return the losses so far.

    Raises:
        ValueError: settings out of range, a checkpoint of another training, or a loss that is not finite.
        CheckpointError: the checkpoint cannot be written or read.
    """
    settings.check()
    optimizer = torch.optim.AdamW(parameter_groups(module, backbone, settings))
    store = CheckpointStore(folder / CHECKPOINTS, keep=2)
    wait_for_all_ranks()  # until the first one has cleared what a crash left
    device = next(module.parameters()).device
    identity = full_identity(identity, settings)
    history = _resume(store, module, backbone, optimizer, identity)
    start = len(history)
    module.train()
    loader = step_loader(
        samples,
        batch_size=settings.batch_size,
        start_step=start,
        num_steps=settings.steps,
        num_workers=num_workers,
        collate=collate,
    )
    if after_save is not None and 0 < start < settings.steps:
        after_save(start)
    for step, batch in enumerate(loader, start=start):
        terms = _step(module, optimizer, partial(losses_of, batch), settings, step)
        history.append(math.fsum(float(term) for term in terms.values()))
        if on_step is not None:
            on_step(step + 1, terms)
        is_last = largest_of_ranks(int(asked_to_stop()), device) or step + 1 == settings.steps
        if is_main_process() and (is_last or (step + 1) % settings.save_every == 0):
            moments, about = flatten_optimizer(optimizer)
            tensors = {"model": trained_state(module, backbone), "optimizer": moments}
            store.save(step + 1, tensors, {"identity": identity, "optimizer": about, "losses": history})
        if is_last:
            break
        if after_save is not None:
            after_save(step + 1)
    module.eval()
    return history


def full_identity(identity: Mapping[str, Any], settings: LoopSettings) -> dict[str, Any]:
    """Return what a training depends on with the settings that change the weights, as it comes back from JSON."""
    loop = {name: value for name, value in dataclasses.asdict(settings).items() if name not in WITHOUT_EFFECT}
    full: dict[str, Any] = json.loads(json.dumps(dict(identity) | {"loop": loop}))
    return full


def check_same_training(known: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with another training.

    Args:
        known: identity of the training in the folder.
        identity: of this one.
        folder: holds checkpoints.

    Raises:
        ValueError: names what differs.
    """
    differing = sorted(str(key) for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
    if differing:
        raise ValueError(
            f"{folder} holds a training that differs in {', '.join(differing)}; give another --output, or remove that "
            "folder"
        )


def set_learning_rates(optimizer: torch.optim.Optimizer, settings: LoopSettings, step: int) -> None:
    """Give the groups of an optimiser their learning rates in a step, counted from 0."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * settings.lr_factor(step)


def step_seed(settings: LoopSettings, step: int) -> int:
    """Return the seed of what this process draws in a step beside its samples: dropout, stochastic depth."""
    entropy = (settings.seed, step, *([get_rank()] if get_rank() else []))
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def check_finite(terms: Losses, step: int) -> None:
    """Refuse a loss that is not finite.

    Args:
        terms: of the loss.
        step: counted from 0.

    Raises:
        ValueError: names the step and the terms.
    """
    if not all(math.isfinite(float(term)) for term in terms.values()):
        values = ", ".join(f"{name} {float(term):g}" for name, term in terms.items())
        raise ValueError(f"the loss of step {step + 1} is not finite ({values}): lower lr, or look at the images")


def means_over_ranks(terms: Losses) -> Losses:
    """Return the means of numbers over all processes, float32 and detached; every process calls it."""
    means = all_reduce_mean(torch.stack([term.detach().float() for term in terms.values()]))
    return dict(zip(terms, means, strict=True))


def _step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_terms: Callable[[], Losses],
    settings: LoopSettings,
    step: int,
) -> Losses:
    """Make one step and return the terms of its loss, detached."""
    set_learning_rates(optimizer, settings, step)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(settings, step))
        terms = loss_terms()
        loss = torch.stack(list(terms.values())).sum()
    found = means_over_ranks(terms)
    check_finite(found, step)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    average_gradients_(module.parameters())
    if settings.clip_grad > 0:
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip_grad)
    optimizer.step()
    return found


def _resume(
    store: CheckpointStore,
    module: nn.Module,
    backbone: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> list[float]:
    """Load the newest checkpoint, where there is one, and return the losses up to it."""
    if store.latest_step() is None:
        return []
    checkpoint = store.load()
    check_same_training(checkpoint.state.get("identity", {}), identity, store.directory)
    own = trained_state(module, backbone)
    found = checkpoint.tensors["model"]
    assert own.keys() == found.keys()  # the identity is the same
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])
    restore_optimizer_(optimizer, checkpoint.tensors.get("optimizer", {}), checkpoint.state["optimizer"])
    return [float(value) for value in checkpoint.state["losses"]]
