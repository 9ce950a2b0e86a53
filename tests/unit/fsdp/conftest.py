"""A small state to save, told apart by the step it belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore, sha256_of_tensors


class States:
    """Makes and recognises the state of a step."""

    @staticmethod
    def tensors(step: int) -> dict[str, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(step)
        student = {"weight": torch.randn(3, 5, generator=generator), "bias": torch.randn(5, generator=generator)}
        return {"student": student, "optimizer": {"step": torch.tensor(float(step))}}

    @staticmethod
    def state(step: int) -> dict[str, Any]:
        return {"position": step * 64, "nested": {"note": "θ", "values": [1, 0.1, None, True]}}

    def save(self, store: CheckpointStore, *steps: int) -> None:
        for step in steps:
            store.save(step, self.tensors(step), self.state(step))

    def is_of(self, checkpoint: Checkpoint, step: int) -> bool:
        """Return whether ``checkpoint`` is bit for bit the state of ``step``."""
        expected = self.tensors(step)
        return (
            checkpoint.step == step
            and checkpoint.state == self.state(step)
            and checkpoint.tensors.keys() == expected.keys()
            and all(sha256_of_tensors(checkpoint.tensors[k]) == sha256_of_tensors(expected[k]) for k in expected)
        )


@pytest.fixture
def states() -> States:
    return States()
