"""Process queries and reductions without a group, in a group of one, and between two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov2_equi.distributed.collectives import all_reduce_mean, all_reduce_sum_
from dinov2_equi.distributed.env import get_rank, get_world_size, is_distributed, is_main_process


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_single_process_without_a_group_is_the_main_one() -> None:
    assert (is_distributed(), get_rank(), get_world_size(), is_main_process()) == (False, 0, 1, True)


def test_reductions_without_a_group_are_the_identity() -> None:
    tensor = torch.tensor([1.0, -2.0])
    assert all_reduce_sum_(tensor) is tensor
    assert all_reduce_mean(tensor) is tensor
    assert tensor.tolist() == [1.0, -2.0]


def test_a_group_of_one_is_distributed(group_of_one: None) -> None:
    assert (is_distributed(), get_rank(), get_world_size(), is_main_process()) == (True, 0, 1, True)


def test_reductions_take_tensors_with_gradient(group_of_one: None) -> None:
    tensor = torch.tensor([1.0, -2.0], requires_grad=True)
    mean = all_reduce_mean(tensor)
    assert mean.tolist() == [1.0, -2.0]
    assert not mean.requires_grad


def _reduce_on_rank(rank: int, directory: str) -> None:
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    value = torch.tensor([1.0, 10.0]) * (rank + 1)
    mean = all_reduce_mean(value)
    result = {
        "ranks": torch.tensor([get_rank(), get_world_size(), int(is_main_process())]),
        "untouched": value.clone(),
        "mean": mean,
        "sum": all_reduce_sum_(value),
        "in_place": value,
    }
    torch.save(result, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_sum_and_average(tmp_path: Path) -> None:
    mp.spawn(_reduce_on_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert result["ranks"].tolist() == [rank, 2, int(rank == 0)]
        assert result["untouched"].tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)]
        assert result["mean"].tolist() == [1.5, 15.0]
        assert result["sum"].tolist() == [3.0, 30.0]
        assert result["in_place"].tolist() == [3.0, 30.0]
