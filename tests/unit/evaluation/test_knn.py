"""k-NN against a plain float64 loop, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_equi.evaluation.knn import weighted_knn


def loop_knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, k: int, t: float) -> float:
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    correct = 0
    for x, y in zip(test, truth, strict=True):
        similarity = [float(np.dot(x, row)) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = np.zeros(labels.max() + 1)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / t)
        correct += int(np.argmax(votes) == y)
    return correct / len(test)


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return overlapping clusters, so that accuracy is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.3 * torch.randn(n, 6, generator=generator), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("train_chunk_size", [1, 7, 25, 60, 1000])
def test_accuracy_equals_a_plain_loop(temperature: float, train_chunk_size: int) -> None:
    (train, train_labels), (test, test_labels) = clusters(60, 0), clusters(41, 1)
    ks = (1, 5, 20, 60)
    got = weighted_knn(
        train,
        train_labels,
        test,
        test_labels,
        ks=ks,
        temperature=temperature,
        chunk_size=16,
        train_chunk_size=train_chunk_size,
    )
    arrays = [tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
              for tensor in (train, train_labels, test, test_labels)]  # fmt: skip
    # Counts of right answers: equal exactly unless two classes tie within float32, which these data do not do.
    assert got == {k: loop_knn(*arrays, k, temperature) for k in ks}
    assert 0.3 < got[5] < 0.95


@pytest.mark.parametrize("num_devices", [1, 2, 3, 70])
def test_share_of_a_device_is_left_out_or_counted_from_another_row(num_devices: int) -> None:
    (train, train_labels), (test, test_labels) = clusters(60, 0), clusters(41, 1)
    ks = (1, 5, 20, 60)  # more neighbours than a share of the training features has
    alone = weighted_knn(train, train_labels, test, test_labels, ks=ks)
    shared = weighted_knn(train, train_labels, test, test_labels, ks=ks, devices=["cpu"] * num_devices, chunk_size=16)
    assert shared == alone


def test_length_of_a_feature_does_not_matter() -> None:
    (train, labels), (test, truth) = clusters(50, 2), clusters(20, 3)
    stretched = train * torch.linspace(0.1, 10, len(train))[:, None]
    assert weighted_knn(train, labels, test, truth, ks=(7,)) == weighted_knn(stretched, labels, test, truth, ks=(7,))


def test_weights_decide_where_a_plain_majority_would_be_wrong() -> None:
    train = torch.tensor([[1.0, 0.0], [0.5, 0.9], [0.5, 0.9]])
    labels, test, truth = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert weighted_knn(train, labels, test, truth, ks=(3,), temperature=0.07) == {3: 1.0}
    assert weighted_knn(train, labels, test, truth, ks=(3,), temperature=100.0) == {3: 0.0}


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures_neither_overflow_nor_vanish(temperature: float) -> None:
    # The nearest neighbour is far (cosine 0.6): exp(0.6 / 1e-4) overflows, exp((0.6 - 1) / 1e-4) is 0 for all.
    train, labels = torch.tensor([[0.6, 0.8], [-1.0, 0.1]]), torch.tensor([1, 0])
    test = torch.tensor([[1.0, 0.0]])
    accuracy = weighted_knn(train, labels, test, torch.tensor([1]), ks=(2,), temperature=temperature)
    assert accuracy == {2: 1.0}


def test_a_class_that_was_never_seen_counts_as_wrong() -> None:
    train, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert weighted_knn(train, labels, train, torch.tensor([0, 1, 7]), ks=(1,)) == {1: pytest.approx(2 / 3)}


def test_half_precision_features_are_accepted() -> None:
    (train, labels), (test, truth) = clusters(30, 4), clusters(10, 5)
    assert weighted_knn(train.half(), labels, test.half(), truth, ks=(3,))[3] > 0


@pytest.mark.parametrize("ks", [(), (0,), (4,), (2, 99)])
def test_impossible_numbers_of_neighbours_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.3"):
        weighted_knn(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ks=ks)


@pytest.mark.parametrize(
    ("train", "labels", "test", "truth", "message"),
    [
        (torch.eye(3), torch.arange(2), torch.eye(3), torch.arange(3), "train features"),
        (torch.eye(3), torch.arange(3), torch.empty(0, 3), torch.arange(0), "test features"),
        (torch.eye(3), torch.arange(3), torch.rand(2, 4), torch.arange(2), "3 wide and test features 4"),
        (torch.eye(3), torch.arange(3) - 1, torch.eye(3), torch.arange(3), "integers >= 0"),
        (torch.eye(3), torch.rand(3), torch.eye(3), torch.arange(3), "integers >= 0"),
    ],
)
def test_sets_that_do_not_fit_are_named(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_knn(train, labels, test, truth, ks=(1,))


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        weighted_knn(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ks=(1,), temperature=0.0)
