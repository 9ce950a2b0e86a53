"""Few labelled images, and retrieval, against plain loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from dinov2_equi.evaluation import few_shot as module
from dinov2_equi.evaluation.few_shot import few_shot
from dinov2_equi.evaluation.retrieval import mean_average_precision

C, F = 4, 16


def make_data(n: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(C, F, generator=torch.Generator().manual_seed(7))
    labels = torch.randperm(n, generator=generator) % C
    return centres[labels] + spread * torch.randn(n, F, generator=generator), labels


# ------------------------------------------------------------------------------------------------------------- few_shot


def test_more_images_do_not_help_or_draws_are_alike() -> None:
    found = few_shot(*make_data(80, 0, 2.0), *make_data(400, 1, 2.0), shots=(1, 16), num_draws=4)
    for classifier in ("class_mean", "log_regression"):
        few, many = found[1][classifier], found[16][classifier]
        assert len(few) == len(many) == 4
        assert sum(many) > sum(few) + 0.4
        assert len(set(few)) > 1


def test_class_means_are_other_than_those_of_a_plain_loop() -> None:
    (x, y), (test_x, test_y) = make_data(12, 0), make_data(50, 1)
    found = few_shot(x, y, test_x, test_y, shots=(3,), num_draws=1)[3]["class_mean"]  # all images of each class
    unit = x / x.norm(dim=1, keepdim=True)
    right = 0
    for features, label in zip(test_x, test_y.tolist(), strict=True):
        means = [unit[y == c].mean(dim=0) for c in range(C)]
        cosines = [float(features @ mean / (features.norm() * mean.norm())) for mean in means]
        right += int(np.argmax(cosines) == label)
    assert found == [right / 50]


def test_draw_of_few_images_is_no_part_of_the_draw_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[float]] = []

    def keep(x: Tensor, y: Tensor, *_: Tensor) -> float:
        drawn.append(set(x[:, 0].tolist()))
        assert torch.bincount(y).tolist() == [len(y) // C] * C
        return 0.0

    monkeypatch.setattr(module, "_class_mean_accuracy", keep)
    few_shot(*make_data(80, 0), *make_data(8, 1), shots=(1, 2, 8), num_draws=2)
    for draw in (drawn[:3], drawn[3:]):
        assert draw[0] < draw[1] < draw[2]
    assert drawn[0] != drawn[3]


def test_same_seed_gives_other_images() -> None:
    data = (*make_data(80, 0, 2.0), *make_data(40, 1, 2.0))
    first, again, other = (few_shot(*data, shots=(1,), num_draws=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_class_with_too_few_images_is_drawn_from() -> None:
    with pytest.raises(ValueError, match="shots from 1 to 3"):
        few_shot(*make_data(12, 0), *make_data(8, 1), shots=(4,))


# ------------------------------------------------------------------------------------------------------------ retrieval


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_mean_average_precision_differs_from_scikit_learn(chunk_size: int) -> None:
    (queries, q_labels), (gallery, g_labels) = make_data(20, 0, 2.0), make_data(60, 1, 2.0)
    expected = []
    for features, label in zip(queries, q_labels, strict=True):
        scores = torch.nn.functional.cosine_similarity(features[None], gallery)
        expected.append(average_precision_score((g_labels == label).numpy(), scores.numpy()))
    found = mean_average_precision(queries, q_labels, gallery, g_labels, chunk_size=chunk_size)
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_query_without_a_relevant_image_counts() -> None:
    features = torch.eye(3)
    gallery, labels = features[:2], torch.tensor([0, 1])
    assert mean_average_precision(features, torch.tensor([0, 1, 9]), gallery, labels) == 1.0
    with pytest.raises(ValueError, match="no query has an image of its class"):
        mean_average_precision(features[:1], torch.tensor([5]), gallery, labels)
