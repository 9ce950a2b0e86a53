"""What frozen features know of a transformation, and whether they change with it: the whole measurement of a backbone.

For each family of transforms: how well its parameters are regressed from features of an image and of its transformed
copy (equivariance, `transform_regression`), how alike the two features are (`invariance`), and whether the copy still
finds its class (`knn`). Images are encoded once; every choice of features is read from the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinov2_equi.evaluation.eval_model import EvalModel, select_features
from dinov2_equi.evaluation.invariance import different_images_similarity, pair_similarity
from dinov2_equi.evaluation.knn import weighted_knn
from dinov2_equi.evaluation.probe_images import ProbeImages, as_float
from dinov2_equi.evaluation.transform_regression import (
    ProbeResult,
    draw_pairs,
    pair_seeds,
    regression_probe,
    transformed_batches,
    warn_about_shared_images,
)

if TYPE_CHECKING:
    from dinov2_equi.equi.families.base import TransformFamily

Accuracies = dict[int, float]
"""k-NN accuracy in [0, 1] by the number of neighbours."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a backbone is measured.

    Attributes:
        features: names of the features to probe; those that a backbone does not have are left out.
        seeds: of the draws and of the probes; results are repeated over them.
        draws: transforms drawn for each image. Few pairs measure how the probe overfits them.
        epochs: passes of a probe over its pairs.
        hidden: units in each of its hidden layers.
        fractions: shares of the training pairs at which the learning curve is measured besides all of them.
        curve_features: what the curve is measured with, one of `features`.
        ks: numbers of neighbours; those above the number of training images are left out.
        batch_size: images in one forward pass.
    """

    features: Sequence[str] = ("cls", "patch_mean", "both", "invariant", "equivariant")
    seeds: Sequence[int] = (0, 1, 2)
    draws: int = 4
    epochs: int = 20
    hidden: int = 1024
    fractions: Sequence[float] = (0.25, 0.5, 0.75)
    curve_features: str = "both"
    ks: Sequence[int] = (10, 20)
    batch_size: int = 64

    def check(self) -> None:
        """Refuse settings that measure nothing.

        Raises:
            ValueError: names the setting.
        """
        if not self.seeds or not self.features or min(self.draws, self.epochs, self.hidden, self.batch_size) < 1:
            raise ValueError(
                "needs at least one seed, one kind of features, one draw, one epoch, one hidden unit and a batch of "
                f"one; got {self}"
            )
        if self.curve_features not in self.features:
            raise ValueError(f"curve_features {self.curve_features!r} is not among {', '.join(self.features)}")
        if not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(f"fractions of the pairs must lie between 0 and 1, got {list(self.fractions)}")


@dataclass(frozen=True)
class FamilyScores:
    """What was found with one family of transforms. Lists run over the seeds."""

    probes: dict[str, list[ProbeResult]]
    """Regression of the parameters, by features."""

    curve: dict[int, list[float]]
    """Pooled R2 with `curve_features` by the number of training pairs, in rising order."""

    similarity: dict[str, list[float]]
    """Cosine similarity between the features of a test image and of its copy, by features."""

    knn: dict[str, list[Accuracies]]
    """Accuracy when transformed test images are classified by plain training images, by features; may be empty."""


@dataclass(frozen=True)
class ModelScores:
    """What was found of one backbone."""

    families: dict[str, FamilyScores]
    """By the name of the family."""

    different_similarity: dict[str, float]
    """Cosine similarity between the features of different test images, by features: what `similarity` is read by."""

    knn: dict[str, Accuracies]
    """Accuracy on plain test images, by features; empty where the images have no classes."""


def measure_equivariance(
    model: EvalModel,
    images: ProbeImages,
    families: Mapping[str, TransformFamily],
    settings: ProbeSettings,
    *,
    device: torch.device | str,
    on_step: Callable[[], None] | None = None,
) -> ModelScores:
    """Measure one backbone with every family and seed.

    Pairs depend on seed, family and numbers alone: two backbones of the same ranges are asked about the same pairs.

    Args:
        model: its weights live on `device`.
        images: disjoint; a warning says how many are not.
        families: transforms by name.
        settings: see there.
        device: where backbone, transforms and probes run.
        on_step: called `count_steps` times while it goes on.

    Raises:
        ValueError: for settings or images that measure nothing.
    """
    settings.check()
    if len(images.train) < 1 or len(images.test) < 2:
        raise ValueError(f"needs a training image and two test images, got {len(images.train)} and {len(images.test)}")
    warn_about_shared_images(images.train, images.test)
    measurement = _Measurement(model, images, settings, device, on_step or _nothing)
    plain = tuple(measurement.plain_features(side) for side in (images.train, images.test))
    names = available_features(model, settings)
    return ModelScores(
        families={name: measurement.family(family, *plain) for name, family in families.items()},
        different_similarity={name: different_images_similarity(select_features(plain[1], name)) for name in names},
        knn={name: measurement.knn(name, *plain) for name in names} if images.labels is not None else {},
    )


def available_features(model: EvalModel, settings: ProbeSettings) -> tuple[str, ...]:
    """Return the features of the settings that a backbone has.

    Raises:
        ValueError: if it has none of them, or lacks those of the learning curve.
    """
    names = tuple(name for name in settings.features if name in model.feature_names)
    if settings.curve_features not in names:
        raise ValueError(
            f"{model.name} has no features {settings.curve_features!r}; it has {', '.join(model.feature_names)}"
        )
    return names


def count_steps(model: EvalModel, images: ProbeImages, settings: ProbeSettings, num_families: int) -> int:
    """Return how often `measure_equivariance` calls `on_step`: once a forward pass, once an epoch of a probe."""

    def passes(draws: int) -> int:
        return sum(math.ceil(draws * len(side) / settings.batch_size) for side in (images.train, images.test))

    num_pairs = settings.draws * len(images.train)
    num_probes = len(available_features(model, settings)) + len(_curve_counts(settings, num_pairs))
    repeated = passes(settings.draws) + num_probes * settings.epochs
    return passes(1) + num_families * len(settings.seeds) * repeated


def _curve_counts(settings: ProbeSettings, num_pairs: int) -> list[int]:
    """Return the numbers of pairs, below all of them, at which the learning curve is measured."""
    return sorted({max(1, round(fraction * num_pairs)) for fraction in settings.fractions} - {num_pairs})


def _nothing() -> None:
    """Do nothing after a step."""


@dataclass(frozen=True)
class _Pairs:
    """Features of images and of their transformed copies."""

    plain: dict[str, Tensor]  # [num_pairs, F] each, an image as often as it was drawn
    transformed: dict[str, Tensor]  # [num_pairs, F] each
    theta: Tensor  # [num_pairs, P]

    def joined(self, name: str, count: int | None = None) -> Tensor:
        """Return the features of the first `count` pairs side by side, [count, 2F]."""
        both = (select_features(features, name)[:count] for features in (self.plain, self.transformed))
        return torch.cat(tuple(both), dim=1)


@dataclass(frozen=True)
class _Measurement:
    """One backbone on one set of images."""

    model: EvalModel
    images: ProbeImages
    settings: ProbeSettings
    device: torch.device | str
    on_step: Callable[[], None]

    def plain_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of images as they are."""
        batches = (as_float(batch) for batch in images.split(self.settings.batch_size))
        return self.model.features(
            batches, device=self.device, batch_size=self.settings.batch_size, on_batch=self.on_step
        )

    def family(self, family: TransformFamily, train: dict[str, Tensor], test: dict[str, Tensor]) -> FamilyScores:
        """Return what is found with one family; `train` and `test` are the features of the plain images."""
        names = available_features(self.model, self.settings)
        scores = FamilyScores({name: [] for name in names}, {}, {name: [] for name in names}, {})
        for seed in self.settings.seeds:
            train_seed, test_seed = pair_seeds(seed)
            train_pairs = self._pairs(family, self.images.train, train, train_seed)
            test_pairs = self._pairs(family, self.images.test, test, test_seed)
            for name in names:
                result = self._probe(name, train_pairs, test_pairs, seed)
                scores.probes[name].append(replace(result, output_names=tuple(family.param_names)))
                copies = select_features(test_pairs.transformed, name)
                scores.similarity[name].append(pair_similarity(select_features(test_pairs.plain, name), copies))
                if self.images.labels is not None:
                    scores.knn.setdefault(name, []).append(self.knn(name, train, test_pairs.transformed))
            self._extend_curve(scores, train_pairs, test_pairs, seed)
        return scores

    def _pairs(self, family: TransformFamily, images: Tensor, plain: dict[str, Tensor], seed: int) -> _Pairs:
        size = self.settings.batch_size
        drawn = draw_pairs(family, len(images), self.settings.draws * len(images), seed)
        copies = transformed_batches(family, images, drawn, device=self.device, batch_size=size)
        features = self.model.features(copies, device=self.device, batch_size=size, on_batch=self.on_step)
        return _Pairs({name: values[drawn.source] for name, values in plain.items()}, features, drawn.theta)

    def _probe(self, name: str, train: _Pairs, test: _Pairs, seed: int, count: int | None = None) -> ProbeResult:
        return regression_probe(
            train.joined(name, count),
            train.theta[:count],
            test.joined(name),
            test.theta,
            hidden=self.settings.hidden,
            epochs=self.settings.epochs,
            seed=seed,
            device=self.device,
            on_epoch=self.on_step,
        )

    def _extend_curve(self, scores: FamilyScores, train: _Pairs, test: _Pairs, seed: int) -> None:
        """Add one seed to the learning curve; the last point is the probe that was trained on all pairs."""
        name = self.settings.curve_features
        for count in _curve_counts(self.settings, len(train.theta)):
            result = self._probe(name, train, test, seed, count)
            scores.curve.setdefault(count, []).append(result.r2_pooled)
        scores.curve.setdefault(len(train.theta), []).append(scores.probes[name][-1].r2_pooled)

    def knn(self, name: str, train: dict[str, Tensor], test: dict[str, Tensor]) -> Accuracies:
        """Return the accuracy of test features, of which the first m are of the m test images in their order."""
        assert self.images.labels is not None
        train_labels, test_labels = self.images.labels
        ks = [k for k in self.settings.ks if k <= len(train_labels)] or [len(train_labels)]
        neighbours = select_features(train, name)
        return weighted_knn(
            neighbours, train_labels, select_features(test, name)[: len(test_labels)], test_labels, ks=ks
        )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, None for a single value; both NaN where a value is."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single value) and the values themselves."""
    mean, deviation = mean_and_deviation(values)
    return {"mean": mean, "std": deviation, "values": list(values)}


def scores_as_numbers(scores: ModelScores) -> dict[str, Any]:
    """Return every number of a backbone as nested mappings for `write_results`."""
    return {
        "families": {name: _family_as_numbers(family) for name, family in scores.families.items()},
        "cosine_different_images": scores.different_similarity,
        "knn": scores.knn,
    }


def _family_as_numbers(scores: FamilyScores) -> dict[str, Any]:
    return {
        "r2": {name: _probes_as_numbers(probes) for name, probes in scores.probes.items()},
        "r2_by_pairs": {count: summarize(values) for count, values in scores.curve.items()},
        "cosine": {name: summarize(values) for name, values in scores.similarity.items()},
        "knn_transformed": {
            name: {k: summarize([accuracies[k] for accuracies in runs]) for k in runs[0]}
            for name, runs in scores.knn.items()
        },
    }


def _probes_as_numbers(probes: Sequence[ProbeResult]) -> dict[str, Any]:
    outputs = probes[0].output_names
    return {
        "pooled": summarize([probe.r2_pooled for probe in probes]),
        "pooled_on_training_pairs": summarize([probe.train_r2_pooled for probe in probes]),
        "per_output": {
            name: summarize([probe.r2_per_output[index] for probe in probes]) for index, name in enumerate(outputs)
        },
        "mean_absolute_error": {
            name: summarize([probe.mean_absolute_errors[index] for probe in probes])
            for index, name in enumerate(outputs)
        },
        "num_train_pairs": probes[0].num_train_pairs,
        "num_test_pairs": probes[0].num_test_pairs,
    }
