"""Regression of a homography from the patch features of two patches: a head of three convolutions.

Source: Wang et al. (AAAI-26), Table 6, which names a 3-layer convolutional head and the mean corner error on S-COCO, no
more; the rest is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.signals import start_worker
from dinov2_equi.distributed.collectives import gather_shares
from dinov2_equi.distributed.env import share_of_rank
from dinov2_equi.evaluation.dense.maps import freeze
from dinov2_equi.evaluation.dense.training import LoopSettings, Losses
from dinov2_equi.evaluation.dense.training import train as train_head
from dinov2_equi.evaluation.dense_features import at_image_size, check_features, feature_map, resample, whole_patches
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.homography_pairs import (
    TEST_STREAM,
    TRAIN_STREAM,
    HomographyPairs,
    Pair,
    PairSettings,
    corner_errors,
)
from dinov2_equi.evaluation.stored_features import dataset_digest, weights_digest

NUM_CORNERS = 4


@dataclass(frozen=True)
class HomographySettings:
    """The task and the recipe of the head.

    Attributes:
        pairs: how pairs are made.
        input_size: side to which the patches are resized for the backbone, pixels, rounded to whole patches; None: that
            of the pairs. Errors are in pixels of the pairs all the same.
        features: one of `dense_features.DENSE_FEATURES`.
        width: channels between the convolutions.
        steps: of training.
        batch_size: pairs in a step.
        lr: learning rate of the head; rises over a twentieth of the steps, then falls along a cosine to 0.
        backbone_lr: of the backbone; 0: frozen.
        weight_decay: of matrices.
        test_pairs: pairs that are measured, always the same for the same images.
        seed: of weights and training pairs.
    """

    pairs: PairSettings = field(default_factory=PairSettings)
    input_size: int | None = None
    features: str = "patches"
    width: int = 256
    steps: int = 5000
    batch_size: int = 64
    lr: float = 1e-3
    backbone_lr: float = 0.0
    weight_decay: float = 0.01
    test_pairs: int = 2000
    seed: int = 0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        self.pairs.check()
        counts = {name: getattr(self, name) for name in ("steps", "batch_size", "test_pairs", "width")}
        wrong = [f"{name} = {value}" for name, value in counts.items() if value < 1]
        if wrong or self.lr <= 0 or self.backbone_lr < 0 or (self.input_size or 1) < 1:
            raise ValueError(
                "expected counts and sizes of at least 1, lr > 0 and backbone_lr >= 0, got "
                + ", ".join([*wrong, f"lr = {self.lr}", f"backbone_lr = {self.backbone_lr}"])
            )

    def loop(self, save_every: int) -> LoopSettings:
        """Return the settings of the training loop, with so many steps between two checkpoints."""
        return LoopSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup_steps=min(max(self.steps // 20, 1), self.steps - 1),
            weight_decay=self.weight_decay,
            layer_decay=1.0,
            backbone_lr=self.backbone_lr / self.lr or 1.0,  # a frozen one has none
            save_every=save_every,
            seed=self.seed,
        )


@dataclass(frozen=True)
class HomographyResult:
    """What was reached."""

    corner_errors: Tensor
    """[n] mean corner error of each test pair, pixels."""

    predicted: Tensor
    """[n, 4, 2] shifts of the corners that were found, pixels."""

    shifts: Tensor
    """[n, 4, 2] true shifts."""

    losses: list[float]
    """Training loss, mean of each hundredth of the steps."""

    @property
    def mean_corner_error(self) -> float:
        """Mean over pairs and corners, pixels."""
        return float(self.corner_errors.mean())

    @property
    def identity_error(self) -> float:
        """The same of always answering that nothing moved, pixels."""
        return float(corner_errors(torch.zeros_like(self.shifts), self.shifts).mean())


class HomographyHead(nn.Module):
    """Three convolutions on the feature maps of both patches: 3 x 3 with stride 2, twice, then one over what is left.

    The last sees every place with weights of its own, so that it can tell the corners apart.
    """

    def __init__(self, dim: int, grid: tuple[int, int], width: int, max_shift: float) -> None:
        """Build the head for maps [B, dim, *grid]; shifts are answered in units of `max_shift` pixels."""
        super().__init__()
        self.max_shift = max_shift
        left = tuple(math.ceil(math.ceil(side / 2) / 2) for side in grid)
        groups = math.gcd(8, width)
        self.layers = nn.Sequential(
            nn.Conv2d(2 * dim, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * NUM_CORNERS, left),  # type: ignore[arg-type]
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return shifts [B, 4, 2] in pixels from feature maps [B, D, h, w]."""
        out: Tensor = self.layers(torch.cat([first, second], dim=1))  # [B, 8, 1, 1]
        return out.reshape(-1, NUM_CORNERS, 2) * self.max_shift


class HomographyNet(nn.Module):
    """A backbone with the head on it; the backbone stays in evaluation mode, without stochastic depth."""

    def __init__(self, model: EvalModel, settings: HomographySettings) -> None:
        """Put a new head on a backbone; the weights of the head are drawn from `settings.seed`."""
        super().__init__()
        check_features(model, settings.features)
        side = settings.input_size or settings.pairs.patch
        self.size = whole_patches((side, side), model.patch_size)
        self.model = at_image_size(model, self.size)
        self.backbone = self.model.backbone
        self.settings = settings
        self.is_frozen = settings.backbone_lr == 0
        freeze(self.backbone, self.is_frozen)
        device = next((p.device for p in model.backbone.parameters()), torch.device("cpu"))
        with torch.no_grad():
            dim, *grid = self._maps(torch.zeros(1, len(model.mean), *self.size, device=device)).shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = HomographyHead(dim, (grid[0], grid[1]), settings.width, settings.pairs.max_shift).to(device)

    def _maps(self, images: Tensor) -> Tensor:
        self.backbone.eval()
        return feature_map(self.model, images, features=self.settings.features)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the shifts [B, 4, 2] in pixels between patches [B, C, P, P] in [0, 1]."""
        images = resample(torch.cat([first, second]), self.size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            maps = self._maps(images)  # [2 * B, D, h, w]
        shifts: Tensor = self.head(*maps.chunk(2))
        return shifts

    def loss(self, pairs: Pair) -> Tensor:
        """Return the mean squared error of the shifts, in units of the largest."""
        error = F.mse_loss(self(pairs.first, pairs.second), pairs.shifts)
        return error / self.settings.pairs.max_shift**2


def fit_homography(
    model: EvalModel,
    train: ImageDataset,
    test: ImageDataset,
    settings: HomographySettings,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    save_every: int = 500,
    on_step: Callable[[int, Losses], None] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> HomographyResult | None:
    """Train a head, going on from its last checkpoint in `folder`, and measure it on pairs of other images.

    A training that was stopped and goes on gives the same numbers as one that was not, on the same device. Every
    process of a group must call it; they divide the pairs of each step and of the measurement, and the first writes.

    Returns:
        what was reached; None where a process was asked to stop, after a checkpoint.

    Args:
        model: its weights live on `device`; trained on where `settings.backbone_lr` is not 0.
        train, test: disjoint images.
        settings: the task and the recipe.
        folder: checkpoints go to `checkpoints` in it; only of a training with the same settings, images and weights.
        device: where to compute.
        num_workers: processes that make pairs.
        save_every: steps between checkpoints.
        on_step: called with the number of steps done and the loss.
        asked_to_stop: asked after each step.

    Raises:
        ValueError: settings out of range, a checkpoint of another training, or a loss that is not finite.
        CheckpointError: no checkpoint is undamaged, or one could not be written.
    """
    settings.check()
    net = HomographyNet(model, settings).to(device)
    pairs = HomographyPairs(
        train, settings.pairs, length=settings.steps * settings.batch_size, stream=TRAIN_STREAM, seed=settings.seed
    )
    losses = train_head(
        net,
        net.backbone,
        lambda batch: {"loss": net.loss(Pair(*(values.to(device) for values in batch)))},
        pairs,
        settings=settings.loop(save_every),
        folder=folder,
        identity=training_identity(model, train, settings),
        num_workers=num_workers,
        on_step=on_step,
        asked_to_stop=asked_to_stop,
    )
    if len(losses) < settings.steps:
        return None
    return measure_homography(net, test, losses, device=device, num_workers=num_workers)


def training_identity(model: EvalModel, train: ImageDataset, settings: HomographySettings) -> dict[str, Any]:
    """Return what a training depends on: weights, images, settings."""
    return {
        "weights": weights_digest(model.backbone),
        "normalisation": [model.mean, model.std],
        "images": dataset_digest(train),
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "test_pairs"},
    }


@torch.no_grad()
def measure_homography(
    net: HomographyNet,
    test: ImageDataset,
    losses: list[float],
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> HomographyResult:
    """Return what a head reaches on the test pairs, which depend on the images and the number of pairs alone."""
    settings = net.settings
    pairs = pairs_to_measure(test, settings)
    share = Subset(pairs, share_of_rank(len(pairs)))
    predicted, shifts = [], []
    loader = DataLoader(share, settings.batch_size, num_workers=num_workers, worker_init_fn=start_worker)
    for first, second, truth, _ in loader:
        predicted.append(net(first.to(device), second.to(device)).cpu())
        shifts.append(truth)
    found, true = (_of_all_ranks(parts, device) for parts in (predicted, shifts))
    return HomographyResult(corner_errors(found, true), found, true, list(_means(losses, 100)))


def _of_all_ranks(parts: list[Tensor], device: torch.device | str) -> Tensor:
    """Return the rows [n, 4, 2] of all processes in the order of the pairs."""
    return torch.tensor(gather_shares([row for part in parts for row in part.tolist()], device))


def pairs_to_measure(images: ImageDataset, settings: HomographySettings) -> HomographyPairs:
    """Return the pairs that are measured: the same for every backbone and seed."""
    return HomographyPairs(images, settings.pairs, length=settings.test_pairs, stream=TEST_STREAM)


def _means(values: list[float], parts: int) -> Iterator[float]:
    """Yield the mean of each of so many equal parts, or the values where they are fewer."""
    parts = min(parts, len(values))
    for part in range(parts):
        piece = values[part * len(values) // parts : (part + 1) * len(values) // parts]
        yield math.fsum(piece) / len(piece)
