"""Everything a run needs to go on as if it had never stopped, and how it travels to and from a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.samplers import RandomStream, random_generator
from dinov2_equi.distributed.collectives import gather_bytes
from dinov2_equi.distributed.env import get_rank, get_world_size
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore, flatten_optimizer, restore_optimizer_
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.fsdp.shards import copy_saved_, layout_of
from dinov2_equi.models.weights import check_exact
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

IDENTITY_SECTIONS = ("student", "dino", "ibot", "vicreg", "equi", "crops", "data")
IDENTITY_KEYS = ("train.dataset_path", "train.seed", "train.centering")
"""Settings that make a run the run it is: a resume under other values would be neither the old run nor a new one."""
BATCH_SIZE, ACCUMULATION, WORLD_SIZE = "train.batch_size_per_gpu", "train.gradient_accumulation_steps", "world_size"
"""Their product makes the run too: the images of a step."""
FREE_KEYS = ("data.max_bad_fraction",)
"""Settings of those sections that may differ all the same: they can stop a run, but do not change it."""
SCHEDULE_KEYS = ("optim.", "teacher.", "train.OFFICIAL_EPOCH_LENGTH", "compute_precision.autocast")
"""Settings that may be changed on purpose, for instance for a longer run, but never unnoticed."""


class ResumeError(ValueError):
    """The run folder holds a run with other settings."""


@dataclass
class TrainState:
    """A run in memory.

    Attributes:
        model: student, teacher, branch and centres.
        optimizer: AdamW over the trainable modules.
        step: number of finished steps; also the index of the next one.
        seconds: time spent in these steps, over all resumes.
        skipped: how many of the steps were not finite and changed nothing.
    """

    model: SSLMetaArch
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.dino_loss.center.device

    def save(self, store: CheckpointStore, cfg: Config, *, in_background: bool = False) -> None:
        """Write a checkpoint of this state; the sample position follows from the step. Every rank must call it.

        Args:
            store: of the run.
            cfg: its configuration.
            in_background: copy the state and return; see `CheckpointStore.save`.
        """
        rng = _random_states_of_all_ranks(self.device)
        optimizer_tensors, optimizer_state = flatten_optimizer(self.optimizer)
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors, "rng": rng}
        facts = {"config": flat_config(cfg), "seconds": self.seconds, "skipped": self.skipped}
        facts[WORLD_SIZE] = get_world_size()
        store.save(self.step, tensors, {"optimizer": optimizer_state} | facts, in_background=in_background)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over weights, optimiser, random state and step of a checkpoint.

        Raises:
            ValueError: if the checkpoint does not fit this model; lists the differences.
            CheckpointError: if it is none of a training run.
        """
        _check_contents(checkpoint)
        own, saved = self.model.state_dict(), checkpoint.tensors["model"]
        _check_dtypes(own, layout_of(saved))
        check_exact(self.model, layout_of(saved))
        copy_saved_(own, saved)
        restore_optimizer_(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        _restore_random_state(checkpoint, self.model.cfg.train.seed)
        self.step = checkpoint.step
        self.seconds = float(checkpoint.state["seconds"])
        self.skipped = int(checkpoint.state.get("skipped", 0))  # younger than the first checkpoints


def check_same_run(checkpoint: Checkpoint, cfg: Config) -> None:
    """Compare the settings of a checkpoint with those of the run about to continue it.

    Settings that do not change what is learned (workers, logging, evaluation) may differ, and so may the number of
    processes as long as a step takes as many images; a changed schedule is warned about, since it can be meant (a
    longer run).

    Raises:
        ResumeError: if a setting differs that would make it another run; names each with both values.
        CheckpointError: if the checkpoint is none of a training run.
    """
    _check_settings(checkpoint)
    now = flat_config(cfg)
    before = flat_config(Config()) | checkpoint.state["config"]  # a key younger than the checkpoint had its default
    changed = [key for key in now if before[key] != now[key]]
    identity = [
        key
        for key in changed
        if (key.split(".")[0] in IDENTITY_SECTIONS and key not in FREE_KEYS) or key in IDENTITY_KEYS
    ]
    listing = "; ".join(f"{key}: was {before[key]!r}, now {now[key]!r}" for key in identity)
    was = before[BATCH_SIZE] * before[ACCUMULATION] * checkpoint.state.get(WORLD_SIZE, 1)
    images = now[BATCH_SIZE] * now[ACCUMULATION] * get_world_size()
    if was != images:
        product = f"{BATCH_SIZE} x {ACCUMULATION} x processes"
        listing += f"{'; ' if listing else ''}{product}: was {was}, now {images}"
    if listing:
        raise ResumeError(
            f"the output folder holds step {checkpoint.step} of a run with other settings ({listing}). "
            "Choose another output folder, or add --no-resume to set the old run aside and start anew"
        )
    for key in (key for key in changed if key.startswith(SCHEDULE_KEYS)):
        logger.warning("resuming with %s = %r; the run so far used %r", key, now[key], before[key])


def _check_settings(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the settings of a run are in the checkpoint."""
    config = checkpoint.state.get("config")
    wrong = [] if isinstance(config, dict) else ["config"]
    if isinstance(config, dict):
        wrong += [key for key in (BATCH_SIZE, ACCUMULATION) if not isinstance(config.get(key, 1), int)]
    if not isinstance(checkpoint.state.get(WORLD_SIZE, 1), int):
        wrong.append(WORLD_SIZE)
    _refuse(checkpoint, wrong)


def _check_contents(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for what is undamaged but was not written by `TrainState.save`: the bundle of a step."""
    state = checkpoint.state
    wrong = [f"{name}.safetensors" for name in ("model", "optimizer", "rng") if name not in checkpoint.tensors]
    if not isinstance(state.get("optimizer"), dict):
        wrong.append("optimizer")
    if not isinstance(state.get("seconds"), (int, float)):
        wrong.append("seconds")
    wrong += [key for key in ("skipped", WORLD_SIZE) if not isinstance(state.get(key, 1), int)]
    _refuse(checkpoint, wrong)


def _refuse(checkpoint: Checkpoint, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} is no checkpoint of a training run: missing or of another type are {', '.join(wrong)}; "
            "give the folder of a run, or restore its checkpoints from a copy"
        )


def _check_dtypes(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor that would be converted: the resume would not be exact."""
    for name in own.keys() & saved.keys():
        if own[name].dtype != saved[name].dtype:
            raise ValueError(
                f"expected {own[name].dtype} for {name}, the checkpoint holds {saved[name].dtype}; resume with the "
                "configuration that wrote it"
            )


def flat_config(cfg: Config) -> dict[str, Any]:
    """Return the configuration as dotted keys and plain values."""

    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat |= walk(f"{prefix}.{key}" if prefix else str(key), value)
        return flat

    return walk("", dataclasses.asdict(cfg))


def random_state() -> dict[str, Tensor]:
    """Return the state of PyTorch's random generators: `cpu`, and `cuda` where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned.

    Raises:
        ValueError: if it is none of this version of PyTorch.
    """
    for name, own in random_state().items():
        value = state.get(name)
        if (name == "cpu" or value is not None) and (
            value is None or value.dtype != own.dtype or value.shape != own.shape
        ):
            raise ValueError(
                f"the random state {name!r} of the checkpoint is none of this PyTorch: expected {len(own)} bytes, got "
                f"{'nothing' if value is None else f'{value.dtype} of shape {list(value.shape)}'}"
            )
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_rank(seed: int, step: int) -> None:
    """Give this process random numbers of its own from here on: two ranks must not drop the same residual branches."""
    numbers = random_generator(RandomStream.RANK, seed, step * get_world_size() + get_rank())
    torch.manual_seed(int(numbers.integers(2**63)))


def _random_states_of_all_ranks(device: torch.device) -> dict[str, Tensor]:
    """Return the states of `random_state`, those of rank r > 0 by names that end in `.r`."""
    states = {}
    for name, state in random_state().items():
        for rank, value in enumerate(gather_bytes(state, device)):
            states[name if rank == 0 else f"{name}.{rank}"] = value
    return states


def _restore_random_state(checkpoint: Checkpoint, seed: int) -> None:
    """Put back the random state of this rank; new numbers, a function of the step, for another number of ranks."""
    if checkpoint.state.get(WORLD_SIZE, 1) != get_world_size():
        seed_rank(seed, checkpoint.step)
        return
    rank = get_rank()
    states = checkpoint.tensors["rng"]
    set_random_state(
        {name: states[name if rank == 0 else f"{name}.{rank}"] for name in ("cpu", "cuda") if name in states}
    )
