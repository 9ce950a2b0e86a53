"""Moving a batch."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from dinov2_equi.data.batch import Batch


@pytest.fixture
def batch() -> Batch:
    return Batch(
        global_crops=torch.rand(4, 3, 8, 6),
        local_crops=torch.rand(6, 3, 4, 2),
        masks=torch.zeros(4, 12, dtype=torch.bool),
        mask_indices=torch.arange(2),
        mask_weights=torch.ones(2),
        positions=torch.tensor([7, 8]),
    )


def test_counts(batch: Batch) -> None:
    assert (batch.batch_size, batch.num_local_crops) == (2, 3)


def test_a_tensor_of_the_device_stays_behind_or_positions_leave_the_cpu(batch: Batch) -> None:
    # Positions seed random draws on the CPU: on a device each draw would wait for it.
    moved = batch.to("meta")
    for name, tensor in moved.tensors().items():
        assert tensor.device.type == ("cpu" if name == "positions" else "meta")
        assert tensor.shape == batch.tensors()[name].shape


def test_staying_on_the_device_copies_nothing(batch: Batch) -> None:
    assert batch.to(torch.device("cpu"), non_blocking=True).global_crops is batch.global_crops


def test_fields_cannot_be_replaced(batch: Batch) -> None:
    with pytest.raises(FrozenInstanceError):
        batch.masks = torch.ones(1)  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_tensor_is_pinned(batch: Batch) -> None:
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned.tensors().values())
