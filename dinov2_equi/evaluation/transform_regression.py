"""Can a transformation be read back from frozen features? The probe that measures equivariance.

A pair is an image I and its transformed copy g(I). A small network sees the frozen features of both and predicts the
parameters of g; the coefficient of determination R^2 on images it never saw says how much of the transformation the
features keep: 1 means all of it, 0 means no better than always answering the average.

Source: the synthetic equivariance regression of the paper (Fig. 2, Table 1), with SIE's released protocol for what the
paper leaves open: two hidden layers of 1024, Adam at 1e-3 without weight decay, batch 256, mean squared error.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.features import Select, extract_features
from dinov2_equi.evaluation.probe_images import as_float

if TYPE_CHECKING:
    from dinov2_equi.equi.families.base import TransformFamily

logger = logging.getLogger(__name__)

_CONSTANT_SPREAD = 1e-6  # of a column's mean: below it, the column counts as constant


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found on test pairs it never saw."""

    r2_pooled: float
    """R^2 over all outputs with one common mean, as SIE and the paper report it."""

    r2_per_output: tuple[float, ...]
    """R^2 of each parameter by itself, [P]; NaN for a parameter that never varies."""

    train_r2_pooled: float
    """The same as `r2_pooled` on the training pairs: far above it means that the probe learnt its pairs by heart."""

    num_train_pairs: int
    """Pairs that the probe was trained on."""

    num_test_pairs: int
    """Pairs that `r2_pooled` and `r2_per_output` were measured on."""

    epochs: int
    """Passes over the training pairs."""

    predictions: Tensor = field(repr=False, compare=False)
    """[n, P] float32: parameters predicted for the test pairs, in the units of the family."""

    targets: Tensor = field(repr=False, compare=False)
    """[n, P] float32: the parameters that were applied."""

    output_names: tuple[str, ...] = ()
    """One name with its unit for each parameter, [P]; empty when the probe was given bare numbers."""

    @property
    def r2_mean(self) -> float:
        """R^2 averaged over the parameters: unlike the pooled one it does not depend on their units."""
        return math.fsum(self.r2_per_output) / len(self.r2_per_output)

    @property
    def mean_absolute_errors(self) -> tuple[float, ...]:
        """Average distance between predicted and true value of each parameter, [P], in its own unit."""
        return tuple((self.predictions - self.targets).abs().mean(dim=0).tolist())


def r2_pooled(predictions: Tensor, targets: Tensor) -> float:
    """Return 1 - RSS/TSS over all numbers of [n, P], with one mean for all outputs; NaN if the targets never vary.

    Outputs of larger range weigh more, and a difference between the outputs' means counts as variance.

    Raises:
        ValueError: if the two are not [n, P] of the same shape with n >= 1.
    """
    predictions, targets = _checked_pair(predictions, targets)
    residual = (targets - predictions).square().sum()
    total = (targets - targets.mean()).square().sum()
    return float(1.0 - residual / total) if total > 0 else math.nan


def r2_per_output(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - RSS/TSS of each output of [n, P], with its own mean: [P] float64; NaN where a target never varies.

    Raises:
        ValueError: if the two are not [n, P] of the same shape with n >= 1.
    """
    predictions, targets = _checked_pair(predictions, targets)
    residual = (targets - predictions).square().sum(dim=0)  # [P]
    total = (targets - targets.mean(dim=0)).square().sum(dim=0)  # [P]
    return torch.where(total > 0, 1.0 - residual / total, torch.nan)


def _checked_pair(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.ndim != 2 or predictions.shape != targets.shape or len(targets) == 0:
        raise ValueError(
            f"expected predictions and targets of one shape [n, P] with n >= 1, got {list(predictions.shape)} "
            f"and {list(targets.shape)}"
        )
    return predictions.double(), targets.double()


def regression_probe(
    features_train: Tensor,
    theta_train: Tensor,
    features_test: Tensor,
    theta_test: Tensor,
    *,
    hidden: int = 1024,
    epochs: int = 40,
    lr: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[], None] | None = None,
) -> ProbeResult:
    """Train a network of two hidden layers to predict `theta` from features, and score it on the test set.

    Features and targets are standardised with the statistics of the training set alone; R^2 is measured in the units of
    `theta`. The caller's random state is neither read nor moved.

    Args:
        features_train: [R, F] float, frozen.
        theta_train: [R, P] float, the parameters to predict.
        features_test: [n, F] float.
        theta_test: [n, P] float.
        hidden: units of each hidden layer.
        epochs: passes over the training set.
        lr: learning rate of Adam.
        batch_size: rows in one update.
        seed: fixes the start of the network and the order of its batches.
        device: where the network is trained.
        on_epoch: called after each pass.

    Raises:
        ValueError: for shapes that do not belong together.

    Source: SIE's evaluation of transformation parameters (arXiv 2302.10283).
    """
    _check_probe_inputs(features_train, theta_train, features_test, theta_test)
    feature_scale = _Standardizer(features_train.to(device).float())
    theta_scale = _Standardizer(theta_train.to(device).float())
    x_train, y_train = feature_scale(features_train.to(device).float()), theta_scale(theta_train.to(device).float())
    x_test = feature_scale(features_test.to(device).float())

    network = _probe_network(x_train.shape[1], hidden, y_train.shape[1], seed).to(device)
    for _ in _fit(network, x_train, y_train, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed):
        if on_epoch is not None:
            on_epoch()
    with torch.no_grad():
        predictions = theta_scale.invert(network(x_test)).cpu()  # [n, P]
        train_predictions = theta_scale.invert(network(x_train)).cpu()  # [R, P]
    targets = theta_test.float().cpu()
    return ProbeResult(
        r2_pooled=r2_pooled(predictions, targets),
        r2_per_output=tuple(r2_per_output(predictions, targets).tolist()),
        train_r2_pooled=r2_pooled(train_predictions, theta_train.float().cpu()),
        num_train_pairs=len(features_train),
        num_test_pairs=len(features_test),
        epochs=epochs,
        predictions=predictions,
        targets=targets,
    )


def transform_regression(
    backbone: nn.Module,
    family: TransformFamily,
    train_images: Tensor,
    test_images: Tensor,
    *,
    num_train_pairs: int,
    num_test_pairs: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 64,
    hidden: int = 1024,
    epochs: int = 40,
    seed: int = 0,
    select: Select = "both",
    channels: slice | None = None,
) -> ProbeResult:
    """Measure how well the parameters of `family` can be read from the features of (I, g(I)).

    The drawn parameters depend on `seed` and the numbers of pairs alone, so two backbones are given the same pairs.

    Args:
        backbone: frozen; its weights live on `device`.
        family: the transformation; draws parameters [b, P] and applies them to images [b, 3, H, W] in [0, 1].
        train_images: [n, 3, H, W] float32 in [0, 1], not normalised; used in turn, again and again.
        test_images: [m, 3, H, W], other photographs than the training ones.
        num_train_pairs, num_test_pairs: pairs the probe learns from, and is scored on.
        mean, std, batch_size, select, channels: see `extract_features`.
        device: where backbone, transformation and probe run.
        hidden, epochs: see `regression_probe`.
        seed: fixes parameters and probe.

    Raises:
        ValueError: if there are no pairs or no images.
    """
    _check_numbers(len(train_images), len(test_images), num_train_pairs, num_test_pairs)
    warn_about_shared_images(train_images, test_images)
    extractor = _PairExtractor(backbone, family, tuple(mean), tuple(std), device, batch_size, select, channels)
    train_seed, test_seed = pair_seeds(seed)
    features_train, theta_train = extractor(train_images, num_train_pairs, train_seed)
    features_test, theta_test = extractor(test_images, num_test_pairs, test_seed)
    result = regression_probe(
        features_train,
        theta_train,
        features_test,
        theta_test,
        hidden=hidden,
        epochs=epochs,
        seed=seed,
        device=device,
    )
    return replace(result, output_names=tuple(family.param_names))


@dataclass(frozen=True)
class DrawnPairs:
    """Which image each pair is made of, and by which transformation; draw d of image i is pair d * n + i."""

    source: Tensor
    """[num_pairs] int64, number of the image."""

    theta: Tensor
    """[num_pairs, P] float32, parameters of the transformation."""


def pair_seeds(seed: int) -> tuple[int, int]:
    """Return the seeds of the training and the test pairs.

    They are unrelated: with seed and seed + 1, a second run at the next seed would test on this run's training
    parameters.
    """
    train_seed, test_seed = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    return train_seed, test_seed


def draw_pairs(family: TransformFamily, num_images: int, num_pairs: int, seed: int) -> DrawnPairs:
    """Return pairs that use the images in turn, again and again; the same for the same seed and number."""
    theta = family.draw(num_pairs, torch.Generator().manual_seed(seed)).float()
    return DrawnPairs(torch.arange(num_pairs) % num_images, theta)


def transformed_batches(
    family: TransformFamily, images: Tensor, pairs: DrawnPairs, *, device: torch.device | str, batch_size: int
) -> Iterator[Tensor]:
    """Yield the transformed images of pairs in their order, [b, 3, H, W] float32 in [0, 1] on the device.

    Args:
        family: transforms a batch at a time.
        images: [n, 3, H, W], float32 in [0, 1] or uint8, which takes a quarter of the memory.
        pairs: numbers below n, and parameters.
        device: where the images are transformed.
        batch_size: pairs in one batch.
    """
    for rows in torch.arange(len(pairs.source)).split(batch_size):
        batch = as_float(images[pairs.source[rows]].to(device))
        yield family.apply(batch, pairs.theta[rows])


@dataclass(frozen=True)
class _PairExtractor:
    """Draws transformed copies of images and returns the features of (I, g(I)) side by side."""

    backbone: nn.Module
    family: TransformFamily
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device | str
    batch_size: int
    select: Select
    channels: slice | None

    def __call__(self, images: Tensor, num_pairs: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return features [num_pairs, 2F] and parameters [num_pairs, P]; pair i uses image i modulo their number."""
        pairs = draw_pairs(self.family, len(images), num_pairs, seed)
        plain = self._features(images[:num_pairs])  # [min(n, num_pairs), F]: once an image, whatever its draws
        copies = transformed_batches(self.family, images, pairs, device=self.device, batch_size=self.batch_size)
        return torch.cat([plain[pairs.source], self._features(copies)], dim=1), pairs.theta

    def _features(self, images: Tensor | Iterable[Tensor]) -> Tensor:
        return extract_features(
            self.backbone,
            images,
            mean=self.mean,
            std=self.std,
            device=self.device,
            batch_size=self.batch_size,
            select=self.select,
            channels=self.channels,
        )


class _Standardizer:
    """Maps each column to mean 0 and deviation 1 of the data it was made from; constant columns become about 0."""

    def __init__(self, values: Tensor) -> None:
        self.mean = values.mean(dim=0)
        deviation = values.std(dim=0, correction=0)
        # A spread near float32's rounding is no signal: dividing by it would blow up the test rows.
        self.std = torch.where(deviation > _CONSTANT_SPREAD * self.mean.abs(), deviation, 1.0)

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std

    def invert(self, values: Tensor) -> Tensor:
        """Return standardised values in their original units."""
        return values * self.std + self.mean


def _check_numbers(num_train_images: int, num_test_images: int, num_train_pairs: int, num_test_pairs: int) -> None:
    if min(num_train_images, num_test_images, num_train_pairs, num_test_pairs) < 1:
        raise ValueError(
            "the probe needs at least one image and one pair on each side, got "
            f"{num_train_images} train images, {num_test_images} test images, "
            f"{num_train_pairs} train pairs, {num_test_pairs} test pairs"
        )


def _check_probe_inputs(features_train: Tensor, theta_train: Tensor, features_test: Tensor, theta_test: Tensor) -> None:
    for name, features, theta in (("train", features_train, theta_train), ("test", features_test, theta_test)):
        if features.ndim != 2 or theta.ndim != 2 or len(features) != len(theta) or len(theta) == 0:
            raise ValueError(
                f"expected {name} features [n, F] and parameters [n, P] with n >= 1, got {list(features.shape)} "
                f"and {list(theta.shape)}"
            )
    if features_train.shape[1] != features_test.shape[1] or theta_train.shape[1] != theta_test.shape[1]:
        raise ValueError(
            f"train and test must have the same widths, got features {features_train.shape[1]} and "
            f"{features_test.shape[1]}, parameters {theta_train.shape[1]} and {theta_test.shape[1]}"
        )


def _probe_network(num_inputs: int, hidden: int, num_outputs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(num_inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_outputs),
        )


def _fit(
    network: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float, batch_size: int, seed: int
) -> Iterator[int]:
    """Train, and yield the number of each pass when it is done."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)  # a quarter of the time on a CPU
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        # The caller may be inside no_grad (an evaluation hook); the probe itself has to learn.
        with torch.enable_grad():
            for rows in torch.split(torch.randperm(len(x), generator=order).to(x.device), batch_size):
                loss = F.mse_loss(network(x[rows]), y[rows])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
        yield epoch


def warn_about_shared_images(train_images: Tensor, test_images: Tensor) -> None:
    """Log how many test images are pixel for pixel in the training set: the score would then flatter the features."""
    known = {_digest(image) for image in train_images}
    num_shared = sum(_digest(image) in known for image in test_images)
    if num_shared:
        logger.warning(
            "%d of the probe's %d test images are also among its training images; its R2 will be too high. "
            "Hold back other images.",
            num_shared,
            len(test_images),
        )


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
