"""NaN and infinity in a batch, a loss or a gradient of a training step."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.fault_campaigns.outcome import Outcome, fingerprint
from benchmarks.fault_campaigns.small_run import CPU, SmallRun
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import CheckpointStore, flatten_optimizer
from dinov2_equi.train.guard import GuardedSteps

VALUES = (math.nan, math.inf, -math.inf)
PLACES = ("batch", "loss", "gradient")
_SOUND_EVERY = 10
_LARGE = 1e30


def learned_hash(run: SmallRun) -> str:
    """Return the SHA-256 of all that is learned: student, teacher, branch, centres, moments and their step counts.

    The random state is not part of it: a skipped step has drawn its random numbers.
    """
    return fingerprint({"model": run.state.model.state_dict(), "optimizer": flatten_optimizer(run.state.optimizer)[0]})


def non_finite_steps(run: SmallRun, folder: Path, count: int, rng: random.Random) -> Outcome:
    """Inject `count` values, each in a step of its own, with a sound step after every tenth.

    A step that is not skipped is sound where the transform moves the pixel out of the crop, or clamps an infinite one
    to the range of pixels: it has to end, bit for bit, as with a finite value in its place.
    """
    outcome = Outcome("step skipped; weights, teacher, centres and moments bit for bit as before")
    steps = GuardedSteps(run.state, run.cfg, store=CheckpointStore(folder), device=CPU, output_dir=folder)
    _sound_step(run, steps, outcome)  # so that there are moments to be lost
    before = learned_hash(run)
    for index in range(count):
        place, value = PLACES[index % len(PLACES)], rng.choice(VALUES)
        batch = run.batches[index % len(run.batches)]
        kept = _Kept(run)
        with _spoiled(place, run, batch, value, rng) as (spoiled, where):
            is_skipped = steps.run(spoiled, run.values) is None
        outcome.count(place)
        after = learned_hash(run)
        if is_skipped:
            problem = None if after == before else "what was learned has changed"
        elif place == "batch" and _ends_alike(run, steps, spoiled, kept, after):
            problem = None
            outcome.count("moved_out_of_the_crop_or_clamped")
        else:
            problem = "the step was not skipped"
        before = learned_hash(run)
        outcome.judge(f"{value} in {where}, case {index}", problem)
        if (index + 1) % _SOUND_EVERY == 0:
            _sound_step(run, steps, outcome)
            before = learned_hash(run)
    return outcome


class _Kept:
    """What a step may change, to go back to."""

    def __init__(self, run: SmallRun) -> None:
        self._model = copy.deepcopy(run.state.model.state_dict())
        self._optimizer = copy.deepcopy(run.state.optimizer.state_dict())
        self._random = torch.get_rng_state()

    def put_back(self, run: SmallRun) -> None:
        run.state.model.load_state_dict(self._model)
        run.state.optimizer.load_state_dict(self._optimizer)
        torch.set_rng_state(self._random)


def _ends_alike(run: SmallRun, steps: GuardedSteps, spoiled: Batch, kept: _Kept, after: str) -> bool:
    """Return whether the step ends with the same hash where the broken pixel is grey, or large instead of infinite."""
    kept.put_back(run)
    names = ("global_crops", "local_crops")
    finite = {name: torch.nan_to_num(getattr(spoiled, name), 0.5, _LARGE, -_LARGE) for name in names}
    return steps.run(replace(spoiled, **finite), run.values) is not None and learned_hash(run) == after


def _sound_step(run: SmallRun, steps: GuardedSteps, outcome: Outcome) -> None:
    """Train a sound step, which has to change the hash, or an unchanged one would prove nothing."""
    before = learned_hash(run)
    if steps.run(run.batches[0], run.values) is None or learned_hash(run) == before:
        outcome.failures.append("a sound step was skipped or changed nothing")


@contextlib.contextmanager
def _spoiled(place: str, run: SmallRun, batch: Batch, value: float, rng: random.Random) -> Iterator[tuple[Batch, str]]:
    """Put the value into one place of the next step; yields the batch to use and where the value is."""
    if place == "batch":
        name = rng.choice(("global_crops", "local_crops"))
        crops: Tensor = getattr(batch, name).clone()
        crops.view(-1)[rng.randrange(crops.numel())] = value
        yield replace(batch, **{name: crops}), name
    elif place == "loss":
        seed = rng.random()
        original = run.state.model.forward_backward

        def spoil(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            names = sorted(output.losses)
            output.losses[names[int(seed * len(names))]].fill_(value)
            return output

        with mock.patch.object(run.state.model, "forward_backward", spoil):
            yield batch, "a loss"
    else:
        parameters = [(n, p) for n, p in run.state.model.named_parameters() if p.requires_grad]
        name, parameter = rng.choice(parameters)
        handle = parameter.register_hook(lambda gradient: _with_value(gradient, value, rng))
        yield batch, f"the gradient of {name}"
        handle.remove()


def _with_value(gradient: Tensor, value: float, rng: random.Random) -> Tensor:
    """Return a copy with one element replaced."""
    spoiled = gradient.clone(memory_format=torch.contiguous_format)
    spoiled.view(-1)[rng.randrange(spoiled.numel())] = value
    return spoiled
