"""The sweep of linear classifiers against one optimiser for each classifier, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.linear import (
    CHOICES,
    BlockTokens,
    Choice,
    LinearResult,
    LinearSweep,
    score_linear,
    train_linear,
)

Noise = Callable[..., Tensor]
D, C, STEPS, BATCH = 6, 3, 8, 32
RATES = (0.05, 0.8)


def make_batches(count: int = STEPS, seed: int = 0) -> list[tuple[BlockTokens, Tensor]]:
    """Return batches of which the last class token and the mean patch token hold the class."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(C, D, generator=torch.Generator().manual_seed(99))
    batches = []
    for _ in range(count):
        labels = torch.randint(C, (BATCH,), generator=generator)
        cls = torch.randn(BATCH, 4, D, generator=generator)
        cls[:, -1] += centres[labels]
        patch_mean = torch.randn(BATCH, D, generator=generator) - centres[labels]
        batches.append((BlockTokens(cls, patch_mean), labels))
    return batches


def sweep_of(batches: list[tuple[BlockTokens, Tensor]], **changes: object) -> tuple[LinearSweep, Tensor]:
    settings = {"num_steps": STEPS, "dim": D, "num_classes": C, "batch_size": BATCH, "learning_rates": RATES}
    return train_linear(batches, **(settings | changes))  # type: ignore[arg-type]


def trained_alone(choice: Choice, rate: float, head: nn.Linear, batches: list[tuple[BlockTokens, Tensor]]) -> nn.Linear:
    """Train one classifier in the plain way."""
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * BATCH / 256, momentum=0.9)
    for step, (tokens, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * BATCH / 256 * (1 + math.cos(math.pi * step / len(batches))) / 2
        parts = [tokens.cls[:, block] for block in range(4 - choice.blocks, 4)]
        if choice.with_patch_mean:
            parts.append(tokens.patch_mean)
        optimizer.zero_grad()
        F.cross_entropy(head(torch.cat(parts, dim=1)), labels).backward()
        optimizer.step()
    return head


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
@pytest.mark.parametrize("rate", RATES)
def test_classifier_of_a_sweep_differs_from_one_trained_alone(choice: Choice, rate: float) -> None:
    batches = make_batches()
    untrained, _ = sweep_of([*batches], learning_rates=[1e-30, *RATES])
    row, column = CHOICES.index(choice), RATES.index(rate)
    start = untrained.heads[row]
    alone = nn.Linear(choice.width(D, D), C)
    with torch.no_grad():
        alone.weight.copy_(start.weight[:C])  # 1e-30 has moved nothing
        alone.bias.zero_()
    trained_alone(choice, rate, alone, batches)
    sweep, _ = sweep_of(batches)
    head = sweep.heads[row]
    rows = slice(column * C, (column + 1) * C)
    torch.testing.assert_close(head.weight[rows], alone.weight, rtol=0, atol=1e-5)  # float32, eight steps
    torch.testing.assert_close(head.bias[rows], alone.bias, rtol=0, atol=1e-5)


def test_accuracy_counts_right_answers() -> None:
    sweep, _ = sweep_of(make_batches())
    batches = make_batches(3, seed=1)
    found = score_linear(sweep, batches)
    assert found.shape == (4, 2)
    for row, choice in enumerate(CHOICES):
        for column in range(2):
            head, rows = sweep.heads[row], slice(column * C, (column + 1) * C)
            right = sum(
                int((choice.select(t) @ head.weight[rows].T + head.bias[rows]).argmax(dim=1).eq(y).sum())
                for t, y in batches
            )
            assert found[row, column].item() == pytest.approx(right / (3 * BATCH))
    assert found.max() > 0.9  # the classes lie apart


def test_classes_that_a_test_set_lacks_are_answers() -> None:
    sweep, _ = sweep_of(make_batches())
    batches = [(tokens, labels) for tokens, labels in make_batches(3, seed=1)]
    only_first = torch.tensor([True, False, False])
    kept = [(BlockTokens(t.cls[y == 0], t.patch_mean[y == 0]), y[y == 0]) for t, y in batches]
    assert score_linear(sweep, kept, allowed=only_first).eq(1).all()


def test_losses_of_the_last_steps_are_those_of_the_first() -> None:
    batches = make_batches(40)
    sweep, last = sweep_of(batches, num_steps=40)
    assert last.shape == (4, 2)
    with torch.no_grad():
        expected = torch.stack([sweep.loss(*batch)[1] for batch in batches[36:]]).mean(dim=0)
    torch.testing.assert_close(last, expected, rtol=0.05, atol=0)  # the cosine has nearly stopped the classifiers


def test_random_state_moves_or_seed_has_no_effect() -> None:
    before = torch.get_rng_state()
    first, again, other = (sweep_of(make_batches(), seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [sweep.heads[0].weight for sweep in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_too_few_batches_end_the_cosine_early() -> None:
    with pytest.raises(ValueError, match="expected 9 batches, got 8"):
        sweep_of(make_batches(), num_steps=9)


@pytest.mark.parametrize("changes", [{"learning_rates": ()}, {"learning_rates": (0.1, 0.0)}, {"choices": ()}])
def test_sweep_of_nothing_is_trained(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="choices of tokens and positive learning rates"):
        sweep_of(make_batches(), **changes)


def test_no_validation_image_has_an_accuracy() -> None:
    with pytest.raises(ValueError, match="at least one validation image"):
        score_linear(sweep_of(make_batches())[0], [])


def test_best_is_not_the_largest_accuracy() -> None:
    accuracies = torch.tensor([[0.1, 0.4], [0.5, 0.5]], dtype=torch.float64)
    choices = (Choice(1, False), Choice(4, True))
    result = LinearResult(choices, (0.01, 0.1), accuracies, torch.zeros(2, 2))
    assert result.best == (Choice(4, True), 0.01, 0.5)
    numbers = result.as_numbers()
    assert numbers["best"] == {"features": "4 blocks, patch mean", "learning_rate": 0.01, "top1": 0.5}
    assert numbers["classifiers"]["1 block"]["0.1"]["top1"] == 0.4  # type: ignore[index]
