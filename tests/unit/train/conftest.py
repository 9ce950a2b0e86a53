"""A run in memory: states and batches made from a configuration, and copies of everything that a step may change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.derive import derive
from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import flatten_optimizer
from dinov2_equi.train.build import build_state
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.state import TrainState


@pytest.fixture(scope="session")
def make_state() -> Callable[[Config], TrainState]:
    """Return a function that starts a run as the training loop does, in training mode."""

    def make(cfg: Config) -> TrainState:
        torch.manual_seed(cfg.train.seed)
        state = build_state(cfg, derive(cfg, world_size=1), torch.device("cpu"))
        state.model.train()
        return state

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Return a function that makes the batch of a configuration: noise, and masks on every other global crop."""

    def make(cfg: Config, *, seed: int = 0, size: tuple[int, int] | None = None) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        B = derive(cfg, world_size=1).batch_size_per_process
        L, p = cfg.crops.local_crops_number, cfg.student.patch_size
        H, W = size or (cfg.crops.global_crops_size, cfg.crops.global_crops_size)
        masks = torch.zeros(2 * B, (H // p) * (W // p), dtype=torch.bool)
        if cfg.ibot.mask_sample_probability > 0:
            masks[1::2] = torch.rand(B, masks.shape[1], generator=generator) < 0.4
            masks[1::2, 0] = True
        num_masked = masks.sum(dim=1)
        return Batch(
            global_crops=torch.rand(2 * B, 3, H, W, generator=generator),
            local_crops=torch.rand(
                L * B, 3, cfg.crops.local_crops_size, cfg.crops.local_crops_size, generator=generator
            ),
            masks=masks,
            mask_indices=masks.flatten().nonzero().flatten(),
            mask_weights=num_masked.clamp(min=1).float().reciprocal().repeat_interleave(num_masked),
            positions=torch.arange(B) + 1000 * seed,
        )

    return make


@pytest.fixture(scope="session")
def step_values() -> StepValues:
    return StepValues(lr=1e-3, wd=0.04, momentum=0.9, teacher_temp=0.05, last_layer_lr=1e-3)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[TrainState], dict[str, Tensor]]:
    """Return a function that copies all that a step may change, gradients and random state aside."""

    def copy_of(state: TrainState) -> dict[str, Tensor]:
        optimizer, _ = flatten_optimizer(state.optimizer)
        tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        tensors["step"] = torch.tensor(state.step)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    return copy_of


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """Return a function that compares two copies, and names what differs."""

    def compare(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert different == []

    return compare
