"""What can be asked of frozen features with labels: the tasks by name, each with the number that a table shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_equi.evaluation.eval_model import BlockTokens
from dinov2_equi.evaluation.few_shot import DEFAULT_SHOTS, few_shot
from dinov2_equi.evaluation.knn import DEFAULT_KS, TEMPERATURE, weighted_knn
from dinov2_equi.evaluation.linear import (
    CHOICES,
    DEFAULT_LEARNING_RATES,
    LinearResult,
    LinearSweep,
    score_linear,
    train_linear,
)
from dinov2_equi.evaluation.log_regression import DEFAULT_CS, log_regression
from dinov2_equi.evaluation.retrieval import mean_average_precision
from dinov2_equi.evaluation.standardization import Standardization, fit_standardization
from dinov2_equi.evaluation.stored_features import StoredFeatures

Numbers = dict[str, Any]

LEAST_EPOCHS, LEAST_STEPS = 10, 2000
"""Of the linear classifiers where nothing else is asked for. Ten passes are enough for ImageNet; of a small data set
they are a few hundred steps, after which the classifiers are points away from what they reach."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of training and test images with their labels."""

    train: StoredFeatures
    train_labels: Tensor
    """[R] int64 from 0."""

    test: StoredFeatures
    test_labels: Tensor
    """[n] int64, numbers of the training classes; or [n, C] bool, the classes that are accepted for each image."""


@dataclass(frozen=True)
class TaskSettings:
    """How the tasks are measured.

    Attributes:
        features: `cls`, `patch_mean` or `both`, for all tasks but `linear`, which compares its own choices.
        ks: neighbours; those above the number of training images are left out.
        temperature: of the votes of the neighbours.
        epochs: passes of the linear classifiers over the training images; None for `LEAST_EPOCHS`, and as many more as
            `LEAST_STEPS` steps need.
        standardize: give the linear classifiers features of mean 0 and deviation 1 in every channel; DINOv2 does not.
        batch_size: images in one step of theirs.
        learning_rates: of theirs, for 256 images.
        cs: inverse penalties of the logistic regression to choose from.
        shots: images of each class in the few-shot task; those above the smallest class are left out.
        num_draws: draws of them.
        only_test_classes: `knn`, `linear` and `log_regression` answer with classes of the test images alone, as is the
            custom for ImageNet-A and -R.
        seed: of initial weights, orders, held-back images and draws.
        device: where to compute.
        knn_devices: several among which the nearest neighbours are searched; none: `device`.
    """

    features: str = "cls"
    ks: Sequence[int] = DEFAULT_KS
    temperature: float = TEMPERATURE
    epochs: int | None = None
    standardize: bool = True
    batch_size: int = 256
    learning_rates: Sequence[float] = DEFAULT_LEARNING_RATES
    cs: Sequence[float] = DEFAULT_CS
    shots: Sequence[int] = DEFAULT_SHOTS
    num_draws: int = 5
    only_test_classes: bool = False
    seed: int = 0
    device: str = "cpu"
    knn_devices: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """Something to measure, and what of it stands in a table."""

    title: str
    measure: Callable[[LabelledFeatures, TaskSettings], Numbers]
    headline: Callable[[Numbers], float]
    """The number for the table, in [0, 1]."""


def _selected(data: LabelledFeatures, settings: TaskSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (
        data.train.select(settings.features),
        data.train_labels,
        data.test.select(settings.features),
        data.test_labels,
    )
    train, train_labels, test, test_labels = (tensor.to(settings.device) for tensor in tensors)
    return train, train_labels, test, test_labels


def _allowed(data: LabelledFeatures, settings: TaskSettings) -> Tensor | None:
    """Return which classes may be answered, [C] bool on the device, or None for all."""
    if not settings.only_test_classes:
        return None
    if data.test_labels.ndim == 2:
        return data.test_labels.any(dim=0).to(settings.device)
    allowed = torch.zeros(int(data.train_labels.max()) + 1, dtype=torch.bool, device=settings.device)
    allowed[data.test_labels.unique().to(settings.device)] = True
    return allowed


def measure_knn(data: LabelledFeatures, settings: TaskSettings) -> Numbers:
    """Return the k-NN accuracy by k; training images of classes that may not be answered do not vote."""
    devices = settings.knn_devices or [settings.device]
    settings = replace(settings, device="cpu")  # each device is given its share, not all of them everything
    train, train_labels, test, test_labels = _selected(data, settings)
    allowed = _allowed(data, settings)
    if allowed is not None:
        votes = allowed[train_labels]
        train, train_labels = train[votes], train_labels[votes]
    ks = [k for k in settings.ks if k <= len(train)] or [len(train)]
    accuracies = weighted_knn(
        train, train_labels, test, test_labels, ks=ks, temperature=settings.temperature, devices=devices
    )
    return {"top1": {str(k): accuracy for k, accuracy in accuracies.items()}}


@dataclass(frozen=True)
class FittedSweep:
    """The linear classifiers after their training, all learning rates and choices of tokens."""

    sweep: LinearSweep
    scaling: Standardization | None
    train_losses: Tensor
    settings: TaskSettings
    batch_size: int

    def accuracies(self, images: StoredFeatures, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the accuracy of every classifier, [H, L] float64; see `LinearSweep.num_correct`."""
        rows = np.array_split(np.arange(len(images)), max(1, len(images) // self.batch_size))
        batches = (_moved(images, labels, part, self.settings.device, self.scaling) for part in rows)
        return score_linear(self.sweep, batches, allowed=allowed)

    def result(self, accuracies: Tensor) -> LinearResult:
        """Return the accuracies with what the classifiers are."""
        return LinearResult(
            self.sweep.choices, tuple(self.settings.learning_rates), accuracies, self.train_losses.cpu()
        )


def fit_sweep(train: StoredFeatures, train_labels: Tensor, settings: TaskSettings) -> FittedSweep:
    """Train the linear classifiers on features of plain images: no augmentation, the same in every pass."""
    num_blocks, dim = train.cls.shape[1:]
    batch_size = min(settings.batch_size, len(train))
    scaling = fit_standardization(train) if settings.standardize else None
    sweep, train_losses = train_linear(
        _shuffled_batches(train, train_labels, batch_size, settings, scaling),
        num_steps=num_linear_steps(settings.epochs, len(train) // batch_size),
        dim=dim,
        patch_dim=train.patch_mean.shape[1],
        num_classes=int(train_labels.max()) + 1,
        batch_size=batch_size,
        choices=[choice for choice in CHOICES if choice.blocks <= num_blocks],
        learning_rates=settings.learning_rates,
        seed=settings.seed,
        device=settings.device,
    )
    return FittedSweep(sweep, scaling, train_losses, settings, batch_size)


def measure_linear(data: LabelledFeatures, settings: TaskSettings) -> Numbers:
    """Return the accuracy of every linear classifier of the sweep, and the best."""
    fitted = fit_sweep(data.train, data.train_labels, settings)
    accuracies = fitted.accuracies(data.test, data.test_labels, _allowed(data, settings))
    return fitted.result(accuracies).as_numbers()


def num_linear_steps(epochs: int | None, steps_an_epoch: int) -> int:
    """Return how many steps the linear classifiers take; see `TaskSettings.epochs`."""
    if epochs is not None:
        return epochs * steps_an_epoch
    return max(LEAST_EPOCHS, -(-LEAST_STEPS // steps_an_epoch)) * steps_an_epoch


def _shuffled_batches(
    features: StoredFeatures,
    labels: Tensor,
    batch_size: int,
    settings: TaskSettings,
    scaling: Standardization | None,
) -> Iterator[tuple[BlockTokens, Tensor]]:
    """Yield batches without end, each pass in another order; a rest below a whole batch is left out."""
    rng = np.random.default_rng(settings.seed)
    while True:
        order = rng.permutation(len(features))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            # Sorted, because reading from disk in order is faster, and the order within a step does not matter.
            yield _moved(features, labels, np.sort(order[start : start + batch_size]), settings.device, scaling)


def _moved(
    features: StoredFeatures,
    labels: Tensor,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    device: str,
    scaling: Standardization | None,
) -> tuple[BlockTokens, Tensor]:
    cls, patch_mean = features.batch(rows)
    tokens = BlockTokens(cls.to(device), patch_mean.to(device))
    return tokens if scaling is None else scaling.apply(tokens), labels[torch.from_numpy(rows)].to(device)


def measure_log_regression(data: LabelledFeatures, settings: TaskSettings) -> Numbers:
    """Return the accuracy of a logistic regression, and the C that was chosen without the test images."""
    result = log_regression(
        *_selected(data, settings), cs=settings.cs, seed=settings.seed, allowed=_allowed(data, settings)
    )
    validation = {f"{c:g}": accuracy for c, accuracy in result.validation.items()}
    return {"top1": result.accuracy, "c": result.c, "validation_top1": validation}


def measure_few_shot(data: LabelledFeatures, settings: TaskSettings) -> Numbers:
    """Return accuracies by number of images a class and classifier: mean, deviation, and each draw."""
    smallest = int(torch.bincount(data.train_labels).min())
    shots = [k for k in settings.shots if k <= smallest] or [smallest]
    found = few_shot(*_selected(data, settings), shots=shots, num_draws=settings.num_draws, seed=settings.seed)
    return {str(k): {name: _spread(values) for name, values in classifiers.items()} for k, classifiers in found.items()}


def _spread(values: list[float]) -> Numbers:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": values}


def measure_retrieval(data: LabelledFeatures, settings: TaskSettings) -> Numbers:
    """Return the mean average precision of the training images, with the test images as queries."""
    train, train_labels, test, test_labels = _selected(data, settings)
    return {"map": mean_average_precision(test, test_labels, train, train_labels)}


def _few_shot_headline(numbers: Numbers) -> float:
    """Return the accuracy of the logistic regression with the most images."""
    return float(numbers[max(numbers, key=int)]["log_regression"]["mean"])


TASKS: dict[str, Task] = {
    "knn": Task("k-NN", measure_knn, lambda numbers: float(max(numbers["top1"].values()))),
    "linear": Task("linear", measure_linear, lambda numbers: float(numbers["best"]["top1"])),
    "log_regression": Task("logistic regression", measure_log_regression, lambda numbers: float(numbers["top1"])),
    "few_shot": Task("few-shot", measure_few_shot, _few_shot_headline),
    "retrieval": Task("retrieval mAP", measure_retrieval, lambda numbers: float(numbers["map"])),
}
"""By the names of the command line."""

ACCEPT_SEVERAL = ("knn", "linear", "log_regression")
"""Tasks whose images may have several right answers."""
