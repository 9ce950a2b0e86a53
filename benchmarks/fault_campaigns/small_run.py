"""The run of `configs/debug_cpu.yaml` inside this process: its state, batches and checkpoints."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2_equi.config.derive import derive
from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.loaders import on_device
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore
from dinov2_equi.train import build
from dinov2_equi.train.schedules import StepValues
from dinov2_equi.train.settings import load_run_config
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug_cpu.yaml"
CPU = torch.device("cpu")
_NUM_BATCHES = 8


@dataclass
class SmallRun:
    """A run with some batches to step on; `values` are those of the middle of its schedules."""

    cfg: Config
    state: TrainState
    batches: list[Batch]
    values: StepValues

    def step(self) -> None:
        """Train one sound step."""
        train_step(self.state, self.batches[self.state.step % len(self.batches)], self.values, self.cfg, CPU)

    def checkpoint(self, store: CheckpointStore) -> Checkpoint:
        """Train one step, save it and return what was saved."""
        self.step()
        self.state.save(store, self.cfg)
        return store.load(self.state.step)


def start(*overrides: str) -> SmallRun:
    """Return the run with random weights, before its first step."""
    cfg = load_run_config([CONFIG], list(overrides))
    derived = derive(cfg, world_size=1)
    torch.set_num_threads(1)
    torch.manual_seed(cfg.train.seed)
    state = build.build_state(cfg, derived, CPU)
    state.model.train()
    dataset, _ = build.build_datasets(cfg)
    loader: Any = build.build_loader(cfg, derived, dataset, start_step=0, pin_memory=False)
    batches = [on_device(batch, CPU) for batch in itertools.islice(loader, _NUM_BATCHES)]
    return SmallRun(cfg, state, batches, build.build_schedules(cfg, derived).at(derived.total_steps // 2))
