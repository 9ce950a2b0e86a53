"""Linear classification of frozen features: all learning rates and choices of tokens in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.accepted_labels import is_right
from dinov2_equi.evaluation.eval_model import BlockTokens

DEFAULT_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""DINOv2's up to 0.1, and what small data sets need beyond; for a batch of 256 images, with which they scale."""

REFERENCE_BATCH = 256
MOMENTUM = 0.9
INITIAL_STD = 0.01


@dataclass(frozen=True, order=True)
class Choice:
    """Which tokens a classifier sees: class tokens of the last `blocks` blocks, and perhaps the mean patch token."""

    blocks: int
    with_patch_mean: bool

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.blocks} block{'s' if self.blocks > 1 else ''}{', patch mean' if self.with_patch_mean else ''}"

    def width(self, dim: int, patch_dim: int) -> int:
        """Return the number of inputs for class tokens of width `dim` and a mean patch token of width `patch_dim`."""
        return dim * self.blocks + patch_dim * self.with_patch_mean

    def select(self, tokens: BlockTokens) -> Tensor:
        """Return the inputs [B, F]."""
        parts = [tokens.cls[:, -self.blocks :].flatten(1)]
        if self.with_patch_mean:
            parts.append(tokens.patch_mean)
        return torch.cat(parts, dim=1)


CHOICES = tuple(Choice(blocks, with_mean) for blocks, with_mean in product((1, 4), (False, True)))
"""DINOv2's."""


class LinearSweep(nn.Module):
    """A linear classifier for each choice of tokens and each learning rate, trained side by side.

    Those of one choice share a matrix product. SGD without weight decay is proportional in its learning rate, so each
    classifier's loss is multiplied by its own rate and one optimiser with rate 1 moves them all: exactly what an
    optimiser for each would do.

    Source: DINOv2's linear evaluation (learning rates, choices, momentum, cosine, initial weights).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        patch_dim: int | None = None,
        choices: Sequence[Choice] = CHOICES,
        learning_rates: Sequence[float],
    ) -> None:
        """Build the classifiers.

        Args:
            dim: D, width of a class token.
            num_classes: C.
            patch_dim: width of the mean patch token where it is another, as of raw pixels.
            choices: of tokens.
            learning_rates: L of them.

        Raises:
            ValueError: without a choice or a rate, or for a rate that is not positive.
        """
        super().__init__()
        if not choices or not learning_rates or min(learning_rates) <= 0:
            raise ValueError(
                f"expected choices of tokens and positive learning rates, got {list(choices)} and "
                f"{list(learning_rates)}"
            )
        self.choices = tuple(choices)
        self.num_classes = num_classes
        self.num_rates = len(learning_rates)
        outputs = self.num_rates * num_classes
        # Without initial weights of their own, whose number would move what is drawn below.
        self.heads = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, choice.width(dim, patch_dim or dim), outputs) for choice in self.choices
        )
        self.register_buffer("rates", torch.tensor(learning_rates), persistent=False)
        self.rates: Tensor
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            # Classifiers of one choice start alike: they differ by their rate alone.
            weight = torch.randn(num_classes, head.in_features) * INITIAL_STD
            with torch.no_grad():
                head.weight.copy_(weight.repeat(self.num_rates, 1))
                head.bias.zero_()

    def forward(self, tokens: BlockTokens) -> Tensor:
        """Return logits [H, L, B, C], H choices and L rates."""
        logits = [
            head(choice.select(tokens).float()).unflatten(1, (self.num_rates, self.num_classes))  # [B, L, C]
            for choice, head in zip(self.choices, self.heads, strict=True)
        ]
        return torch.stack(logits).transpose(1, 2)

    def loss(self, tokens: BlockTokens, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to minimise, a scalar, and the cross-entropies [H, L] themselves, detached; labels are [B]."""
        logits = self(tokens)
        H, L, B, C = logits.shape
        losses = F.cross_entropy(logits.reshape(-1, C), labels.repeat(H * L), reduction="none")
        losses = losses.reshape(H, L, B).mean(dim=2)
        return (losses * self.rates).sum(), losses.detach()

    @torch.no_grad()
    def num_correct(self, tokens: BlockTokens, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return how many images each classifier gets right, [H, L] int64; `allowed` [C] bool hides other classes.

        Labels are [B] class numbers, or [B, C] bool of the classes that are accepted.
        """
        logits = self(tokens)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return is_right(logits.argmax(dim=3), labels).sum(dim=2)


@dataclass(frozen=True)
class LinearResult:
    """Accuracies of all classifiers of a sweep."""

    choices: tuple[Choice, ...]
    learning_rates: tuple[float, ...]
    """As given, for `REFERENCE_BATCH` images."""

    accuracies: Tensor
    """[H, L] in [0, 1], on the validation images."""

    train_losses: Tensor
    """[H, L] cross-entropy, mean over the last tenth of the steps."""

    @property
    def best(self) -> tuple[Choice, float, float]:
        """Choice, learning rate and accuracy of the best classifier; the first one where several are as good."""
        index = int(self.accuracies.argmax())
        row, column = divmod(index, len(self.learning_rates))
        return self.choices[row], self.learning_rates[column], float(self.accuracies.flatten()[index])

    def as_numbers(self) -> dict[str, object]:
        """Return everything as nested mappings for `write_results`."""
        choice, rate, accuracy = self.best
        every = {
            c.name: {
                f"{r:g}": {"top1": float(self.accuracies[i, j]), "train_loss": float(self.train_losses[i, j])}
                for j, r in enumerate(self.learning_rates)
            }
            for i, c in enumerate(self.choices)
        }
        return {"best": {"features": choice.name, "learning_rate": rate, "top1": accuracy}, "classifiers": every}


def train_linear(
    batches: Iterable[tuple[BlockTokens, Tensor]],
    *,
    num_steps: int,
    dim: int,
    patch_dim: int | None = None,
    num_classes: int,
    batch_size: int,
    choices: Sequence[Choice] = CHOICES,
    learning_rates: Sequence[float] = DEFAULT_LEARNING_RATES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
) -> tuple[LinearSweep, Tensor]:
    """Train all classifiers on a stream of batches and return them with their last losses [H, L].

    Args:
        batches: tokens and labels [B] of one step each, on `device`; at least `num_steps` of them.
        num_steps: length of the cosine from the learning rate to 0.
        dim: D, width of a class token.
        patch_dim: width of the mean patch token where it is another.
        num_classes: C.
        batch_size: images in a step, by which the rates are scaled.
        choices: of tokens.
        learning_rates: for `REFERENCE_BATCH` images.
        seed: of the initial weights; the caller's random state is not moved.
        device: of the classifiers.
        on_step: called after each step.

    Raises:
        ValueError: if there are fewer batches than steps.
    """
    scaled = [rate * batch_size / REFERENCE_BATCH for rate in learning_rates]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sweep = LinearSweep(dim, num_classes, patch_dim=patch_dim, choices=choices, learning_rates=scaled)
    sweep.to(device)
    optimizer = torch.optim.SGD(sweep.parameters(), lr=1.0, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    last = torch.zeros_like(sweep.rates).expand(len(sweep.choices), -1)
    first_of_last, steps = num_steps - max(1, num_steps // 10), 0
    for steps, (tokens, labels) in enumerate(batches, start=1):
        with torch.enable_grad():  # the backbone's caller may be inside no_grad
            loss, losses = sweep.loss(tokens, labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        schedule.step()
        if steps > first_of_last:
            last = last + losses / (num_steps - first_of_last)
        if on_step is not None:
            on_step()
        if steps == num_steps:
            break
    if steps < num_steps:
        raise ValueError(f"expected {num_steps} batches, got {steps}; check the number of images and epochs")
    return sweep, last


def score_linear(
    sweep: LinearSweep, batches: Iterable[tuple[BlockTokens, Tensor]], *, allowed: Tensor | None = None
) -> Tensor:
    """Return the accuracies [H, L] of all classifiers on batches of tokens and labels; see `LinearSweep.num_correct`.

    Raises:
        ValueError: if there is no image.
    """
    correct, count = torch.zeros(len(sweep.choices), sweep.num_rates, dtype=torch.int64), 0
    for tokens, labels in batches:
        correct += sweep.num_correct(tokens, labels, allowed).cpu()
        count += len(labels)
    if not count:
        raise ValueError("expected at least one validation image, got none")
    return correct.double() / count
