"""The tasks as the harness calls them: restricted classes, and headlines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2_equi.evaluation.classification import TASKS, LabelledFeatures, TaskSettings
from dinov2_equi.evaluation.stored_features import StoredFeatures

C, D = 4, 8
QUICK = TaskSettings(ks=(5,), epochs=20, batch_size=16, learning_rates=(1.0,), cs=(1.0,), shots=(2,), num_draws=2)


def features(labels: torch.Tensor, seed: int, spread: float) -> StoredFeatures:
    """Return features around a centre for each class; the classes 2 and 3 lie close to 0 and 1."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(2, D))
    centres = 3 * np.concatenate([centres, centres + 0.03])[labels.numpy()]
    cls = np.stack([centres + spread * rng.normal(size=centres.shape) for _ in range(4)], axis=1)
    return StoredFeatures(cls.astype(np.float16), cls[:, -1].astype(np.float16))


@pytest.fixture
def data() -> LabelledFeatures:
    """Return four classes to learn from, and test images of the first two."""
    train_labels, test_labels = torch.arange(80) % C, torch.arange(40) % 2
    return LabelledFeatures(features(train_labels, 0, 1.0), train_labels, features(test_labels, 1, 1.0), test_labels)


@pytest.mark.parametrize("name", ["knn", "linear", "log_regression"])
def test_class_that_no_test_image_has_is_answered(name: str, data: LabelledFeatures) -> None:
    task = TASKS[name]
    free, restricted = (
        task.headline(task.measure(data, replace(QUICK, only_test_classes=only))) for only in (False, True)
    )
    assert free < 0.8  # half of the answers are the neighbour class
    assert restricted > free + 0.15


@pytest.mark.parametrize("name", TASKS)
def test_headline_is_no_share(name: str, data: LabelledFeatures) -> None:
    numbers = TASKS[name].measure(data, QUICK)
    assert 0 < TASKS[name].headline(numbers) <= 1
    assert TASKS[name].measure(data, QUICK) == numbers  # again, to the last digit


@pytest.mark.parametrize("features_name", ["cls", "patch_mean"])
def test_chosen_features_are_not_those_measured(features_name: str, data: LabelledFeatures) -> None:
    blind = StoredFeatures(np.zeros_like(data.train.cls), data.train.patch_mean)
    changed = replace(data, train=blind)
    settings = replace(QUICK, features=features_name)
    same = TASKS["knn"].measure(data, settings) == TASKS["knn"].measure(changed, settings)
    assert same == (features_name == "patch_mean")
