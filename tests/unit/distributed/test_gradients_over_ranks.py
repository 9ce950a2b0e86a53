"""What looks at the images of all ranks gives the values and gradients of one process that holds them all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2_equi.distributed.collectives import (
    average_gradients_,
    gather_bytes,
    gather_rows,
    gather_values,
    largest_of_ranks,
    sum_over_ranks,
)
from dinov2_equi.layers.batch_norm import BatchNorm1d, BatchNorm2d
from dinov2_equi.loss.koleo_loss import KoLeoLoss
from dinov2_equi.loss.vicreg_loss import VICRegLoss

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]
CPU = torch.device("cpu")
B, D = 4, 6  # images of a rank, channels


def on_ranks(world_size: int, folder: Path, function: Callable[[int], None]) -> None:
    """Call the function with its rank in so many forked processes of one group; an exception there fails here."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                store = f"file://{folder}/rendezvous"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
                function(rank)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world_size


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 5), BatchNorm1d(5), nn.Tanh(), nn.Linear(5, D))


def images(world_size: int) -> Tensor:
    return torch.randn(world_size * B, D, generator=torch.Generator().manual_seed(1))


LOSSES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "koleo": lambda out, _: KoLeoLoss()(out),
    "vicreg": lambda out, _: sum(VICRegLoss()(out, out.flip(1)), start=torch.zeros(())),
    "mean of a rank's own": lambda out, _: out.square().mean(),
    "gathered rows": lambda out, _: (gather_rows(out) ** 3).mean(),
    "sum over ranks": lambda out, world_size: sum_over_ranks(out.square().sum(0)).square().sum() / world_size**2,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_loss_over_ranks_differs_from_that_of_one_process(name: str, world_size: int, tmp_path: Path) -> None:
    single = network()
    loss = LOSSES[name](single(images(world_size)), 1)
    loss.backward()
    expected = [parameter.grad for parameter in single.parameters()]
    if name == "sum over ranks":
        # One process sums the rows of all; the plain form has no division by the number of ranks.
        single.zero_grad()
        loss = single(images(world_size)).square().sum(0).square().sum() / world_size**2
        loss.backward()
        expected = [parameter.grad for parameter in single.parameters()]

    def check(rank: int) -> None:
        model = network()
        mine = LOSSES[name](model(images(world_size)[rank * B : (rank + 1) * B]), world_size)
        mine.backward()
        average_gradients_(model.parameters())
        mean = mine.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world_size, loss.detach(), rtol=1e-5, atol=1e-6)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)  # sums in another order

    on_ranks(world_size, tmp_path, check)


def test_batch_norm_of_maps_sees_one_rank_alone(tmp_path: Path) -> None:
    maps = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    norm = BatchNorm2d(3)
    expected = norm(maps)

    def check(rank: int) -> None:
        half = maps[2 * rank : 2 * rank + 2]
        torch.testing.assert_close(norm(half), expected[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
        # In evaluation a process is on its own: the others may not call it.
        if rank == 0:
            assert norm.eval()(half).isfinite().all()

    on_ranks(2, tmp_path, check)


def test_running_statistics_are_those_of_one_rank(tmp_path: Path) -> None:
    maps = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(2)) * 2 + 1
    wanted = nn.BatchNorm2d(3)
    for _ in range(2):
        wanted(maps)

    def check(rank: int) -> None:
        norm = BatchNorm2d(3, has_running_stats=True)
        for _ in range(2):
            norm(maps[2 * rank : 2 * rank + 2])
        for name, value in wanted.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[name], value, rtol=1e-5, atol=1e-5)  # sums in another order

    on_ranks(2, tmp_path, check)


def test_small_and_large_gradients_are_averaged_one_by_one(tmp_path: Path) -> None:
    shapes = [(3,), (40, 500), (), (7, 2)]

    def check(rank: int) -> None:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for number, parameter in enumerate(parameters[:3]):
            parameter.grad = torch.full_like(parameter, float(number + 10 * rank))
        average_gradients_(parameters)
        for number, parameter in enumerate(parameters[:3]):
            assert parameter.grad is not None and (parameter.grad == number + 5).all()
        assert parameters[3].grad is None

    on_ranks(2, tmp_path, check)


def test_numbers_and_bytes_of_ranks_arrive_in_another_order(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        assert largest_of_ranks(15 if rank == 1 else 0, CPU) == 15
        parts = gather_bytes(torch.tensor([rank, 200], dtype=torch.uint8), CPU)
        assert [part.tolist() for part in parts] == [[0, 200], [1, 200], [2, 200]]

    on_ranks(3, tmp_path, check)


def test_values_of_ranks_lose_digits_or_their_order(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        values = gather_values([{"a": 0.1 + rank}] * rank, CPU)
        assert values == [[], [{"a": 1.1}], [{"a": 2.1}] * 2]

    on_ranks(3, tmp_path, check)
    assert gather_values({"a": 0.1}, CPU) == [{"a": 0.1}]


def test_a_single_process_needs_a_group() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows and sum_over_ranks(rows) is rows
    assert largest_of_ranks(4, CPU) == 4
    assert gather_bytes(torch.zeros(1, dtype=torch.uint8), CPU)[0].tolist() == [0]
    average_gradients_([rows])
