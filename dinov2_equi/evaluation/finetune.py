"""Classification with the whole backbone trained on: the usual recipe for ViTs, with layer-wise learning rates."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.samplers import RandomStream, random_generator
from dinov2_equi.data.transforms import EvalTransform, normalize
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.fsdp.checkpoint import CheckpointStore, flatten_optimizer, restore_optimizer_
from dinov2_equi.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

REFERENCE_BATCH = 256
_BLOCK = re.compile(r"^backbone\.blocks\.(?:\d+\.)?(\d+)\.")
_NO_DECAY = re.compile(r"(bias|gamma|cls_token|pos_embed|register_tokens|mask_token)$|norm")


@dataclass(frozen=True)
class FinetuneSettings:
    """The recipe.

    Attributes:
        epochs: passes over the training images.
        warmup_epochs: passes in which the learning rate rises from 0.
        batch_size: images in a step.
        lr: learning rate of the head for 256 images, scaled with the batch.
        layer_decay: factor from one block to the one before it.
        weight_decay: of matrices; biases, norms, LayerScale and tokens have none.
        mixup: strength of mixup; 0: none.
        cutmix: strength of CutMix, in turn with mixup; 0: none.
        label_smoothing: share of the label spread over all classes.
        rand_augment: strength of RandAugment, 0 to 30; 0: none.
        erase_prob: probability of erasing a part of a crop.
        least_scale: least share of an image's area in a crop.
        clip_grad: largest norm of the gradient; 0: not clipped.
        seed: of everything random.

    Source: Touvron et al. 2021 (DeiT, arXiv 2012.12877), table 9; Bao et al. 2022 (BEiT, arXiv 2106.08254) for the
    layer-wise decay.
    """

    epochs: int = 50
    warmup_epochs: int = 5
    batch_size: int = 256
    lr: float = 5e-4
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    rand_augment: int = 9
    erase_prob: float = 0.25
    least_scale: float = 0.08
    clip_grad: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        if self.epochs < 1 or not 0 <= self.warmup_epochs < self.epochs or self.batch_size < 1:
            raise ValueError(
                f"expected 0 <= warmup_epochs < epochs and batch_size >= 1, got {self.warmup_epochs}, {self.epochs}, "
                f"{self.batch_size}"
            )
        if not 0 < self.layer_decay <= 1 or self.lr <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"expected lr > 0, layer_decay in (0, 1] and label_smoothing in [0, 1), got {self.lr}, "
                f"{self.layer_decay}, {self.label_smoothing}"
            )


@dataclass
class FinetuneResult:
    """What was reached."""

    top1: list[float] = field(default_factory=list)
    """Accuracy on the validation images after each pass, in [0, 1]."""

    train_loss: list[float] = field(default_factory=list)
    """Mean loss of each pass, on mixed labels."""


class Classifier(nn.Module):
    """A backbone with a linear layer on its class token; takes images in [0, 1] and normalises them."""

    def __init__(self, model: EvalModel, num_classes: int) -> None:
        """Put a new layer, weights 0.02 and bias 0, on a backbone.

        Raises:
            ValueError: for a backbone of another library: its blocks have other names.
        """
        super().__init__()
        if not isinstance(model.backbone, DinoVisionTransformer):
            raise ValueError(f"{model.name} is a backbone of another library; only DINOv2's architecture is fine-tuned")
        self.backbone = model.backbone
        self.mean, self.std = model.mean, model.std
        self.head = nn.Linear(model.backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, 3, H, W] in [0, 1]."""
        features = self.backbone.forward_features(normalize(images, self.mean, self.std))
        logits: Tensor = self.head(features["x_norm_clstoken"].float())
        return logits


def layer_number(name: str, depth: int) -> int:
    """Return how far from the images a parameter of a `Classifier` lies: 0 tokens and patches, depth + 1 the head."""
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    return depth + 1 if name.startswith(("head.", "backbone.norm.")) else 0


def parameter_groups(classifier: Classifier, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Return groups for AdamW: learning rate by layer, weight decay for matrices alone."""
    depth = classifier.backbone.n_blocks
    lr = settings.lr * settings.batch_size / REFERENCE_BATCH
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in classifier.named_parameters():
        if name == "backbone.mask_token":  # plays no part
            continue
        layer, decays = layer_number(name, depth), not _NO_DECAY.search(name)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "lr": lr * settings.layer_decay ** (depth + 1 - layer),
                "weight_decay": settings.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Labelled images, augmented; what is random about one depends on (seed, epoch, index) alone.

    Args:
        dataset: With classes.
        size: Side of the crops, pixels.
        settings: The recipe.
    """

    def __init__(self, dataset: ImageDataset, size: int, settings: FinetuneSettings) -> None:
        self.dataset = dataset
        self.settings = settings
        self.epoch = 0
        steps: list[nn.Module] = [
            v2.RandomResizedCrop(
                size, (settings.least_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
        ]
        if settings.rand_augment:
            steps.append(v2.RandAugment(magnitude=settings.rand_augment))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(settings.erase_prob, value=0.5)]
        self._transform = v2.Compose(steps)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a crop, float32 [3, size, size] in [0, 1], and its class."""
        assert self.dataset.targets is not None
        number = self.epoch * len(self) + index
        seed = random_generator(RandomStream.AUGMENTATION, self.settings.seed, number).integers(2**62)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            crop: Tensor = self._transform(self.dataset.load_tensor(index))
        return crop, self.dataset.targets[index]


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Labelled images, resized and cropped."""

    def __init__(self, dataset: ImageDataset, labels: Tensor, size: int) -> None:
        """Take the images of a data set and their labels [n], which may be numbered otherwise than there."""
        self.dataset = dataset
        self.labels = labels
        self._transform = EvalTransform(size)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float32 [3, size, size] in [0, 1], and its class."""
        image = self.dataset.load_tensor(index, self._transform.resize)
        return self._transform(image), int(self.labels[index])


def finetune(
    classifier: Classifier,
    train: AugmentedImages,
    val: PlainImages,
    settings: FinetuneSettings,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    on_step: Callable[[float], None] | None = None,
    store: CheckpointStore | None = None,
    identity: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Train a classifier, and measure it after each pass.

    With a store everything is kept after each pass, and a stopped training goes on after the last whole one: on a CPU
    to the same weights, bit for bit, as without the stop.

    Args:
        classifier: changed in place; its weights live on `device`.
        train: augmented images.
        val: plain images.
        settings: the recipe.
        device: where to compute.
        num_workers: processes that make crops.
        on_step: called with the loss of each step.
        store: of checkpoints, numbered by finished passes; None keeps none.
        identity: JSON values, what else has to be the same to go on: weights at the start, images, their size.

    Raises:
        ValueError: for settings out of range, fewer images than a batch, a loss that is not finite, or a store that
            holds another fine-tuning.
        CheckpointError: if a checkpoint cannot be written, or none of those there can be read.
    """
    settings.check()
    steps_an_epoch = len(train) // settings.batch_size
    if not steps_an_epoch:
        raise ValueError(f"expected at least one batch of {settings.batch_size} images, got {len(train)} images")
    optimizer = torch.optim.AdamW(parameter_groups(classifier, settings), betas=(0.9, 0.999), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    factor = _warmup_cosine(settings, steps_an_epoch)
    training = _Training(classifier, optimizer, Mixing(settings, classifier.head.out_features), FinetuneResult())
    facts = json.loads(json.dumps({"settings": dataclasses.asdict(settings), **(identity or {})}))
    result = training.result
    for epoch in range(training.resume(store, facts), settings.epochs):
        classifier.train()
        losses = []
        for step, (images, labels) in enumerate(
            _batches(train, settings, epoch, num_workers), start=epoch * steps_an_epoch
        ):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor(step)
            loss = _step(classifier, optimizer, settings, *training.mix(images.to(device), labels.to(device)))
            losses.append(loss)
            if on_step is not None:
                on_step(loss)
        result.train_loss.append(math.fsum(losses) / len(losses))
        result.top1.append(accuracy(classifier, val, device=device, batch_size=settings.batch_size))
        training.save(store, epoch + 1, facts)
    return result


@dataclass
class _Training:
    """All that changes while a classifier is fine-tuned."""

    classifier: Classifier
    optimizer: torch.optim.AdamW
    mix: Mixing
    result: FinetuneResult

    def save(self, store: CheckpointStore | None, epoch: int, facts: Mapping[str, Any]) -> None:
        """Keep everything after `epoch` passes."""
        if store is None:
            return
        moments, names = flatten_optimizer(self.optimizer)
        tensors = {"model": self.classifier.state_dict(), "optimizer": moments, "random": {"mixing": self.mix.state}}
        store.save(epoch, tensors, {"facts": facts, "optimizer": names, "result": dataclasses.asdict(self.result)})

    def resume(self, store: CheckpointStore | None, facts: Mapping[str, Any]) -> int:
        """Take over the newest sound checkpoint where there is one, and return how many passes are done."""
        if store is None or store.latest_step() is None:
            return 0
        checkpoint = store.load()
        found = checkpoint.state["facts"]
        if found != facts:
            raise ValueError(
                f"{store.directory} holds another fine-tuning ({_differences(found, facts)}); choose another folder, "
                "or remove this one"
            )
        self.classifier.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer_(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        self.mix.state = checkpoint.tensors["random"]["mixing"]
        self.result.top1 += checkpoint.state["result"]["top1"]
        self.result.train_loss += checkpoint.state["result"]["train_loss"]
        logger.info("going on after pass %d from %s", checkpoint.step, checkpoint.path)
        return checkpoint.step


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return what differs between two fine-tunings: settings with both values, else the name alone."""
    before, now = found.get("settings", {}), wanted["settings"]
    parts = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    parts += [f"other {name}" for name in wanted if name != "settings" and found.get(name) != wanted[name]]
    return "; ".join(parts)


def _warmup_cosine(settings: FinetuneSettings, steps_an_epoch: int) -> Callable[[int], float]:
    """Return the factor of the learning rate by step: from near 0 to 1, then along a cosine to 0."""
    warmup, total = settings.warmup_epochs * steps_an_epoch, settings.epochs * steps_an_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return factor


def _batches(
    train: AugmentedImages, settings: FinetuneSettings, epoch: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of one pass, in an order of its own; a rest below a whole batch is left out."""
    train.epoch = epoch  # before the workers start, which copy it
    order = random_generator(RandomStream.ORDER, settings.seed, epoch).permutation(len(train)).tolist()
    loader = DataLoader(train, settings.batch_size, sampler=order, num_workers=num_workers, drop_last=True)
    return iter(loader)


class Mixing:
    """Mixes the images of a batch and their labels, from a random state of its own.

    Args:
        settings: The recipe; without mixup and CutMix nothing is done.
        num_classes: C.
    """

    def __init__(self, settings: FinetuneSettings, num_classes: int) -> None:
        kinds: list[nn.Module] = []
        if settings.mixup > 0:
            kinds.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
        if settings.cutmix > 0:
            kinds.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
        self._choice = v2.RandomChoice(kinds) if kinds else None
        self.state = torch.Generator().manual_seed(settings.seed).get_state()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W] and labels [B, C]; labels [B] as they came where nothing is mixed."""
        if self._choice is None:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            mixed: tuple[Tensor, Tensor] = self._choice(images, labels)
            self.state = torch.get_rng_state()
        return mixed


def _step(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    settings: FinetuneSettings,
    images: Tensor,
    labels: Tensor,
) -> float:
    loss = F.cross_entropy(classifier(images), labels, label_smoothing=settings.label_smoothing)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}: lower the learning rate, or look at the images")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    if settings.clip_grad > 0:
        nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip_grad)
    optimizer.step()
    return value


@torch.no_grad()
def accuracy(classifier: Classifier, val: PlainImages, *, device: torch.device | str, batch_size: int) -> float:
    """Return the share of images whose class is found."""
    classifier.eval()
    right = 0
    for images, labels in DataLoader(val, batch_size):
        right += int(torch.eq(classifier(images.to(device)).argmax(dim=1).cpu(), labels).sum())
    return right / len(val)
