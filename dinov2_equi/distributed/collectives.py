"""Reductions over all ranks; every function is the identity when no process group is initialised."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_equi.distributed.env import get_rank, get_world_size, is_distributed

_BUCKET_BYTES = 64 * 2**20


@torch.no_grad()
def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place and return it.

    Every rank must call it, with the same shape and dtype. No gradient flows through it.
    """
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over all ranks; the input keeps its values.

    Every rank must call it, with the same shape and dtype. No gradient flows through it. In a single process the
    result is the input itself.

    Args:
        tensor: floating point, any shape.
    """
    if not is_distributed():
        return tensor
    return all_reduce_sum_(tensor.detach().clone()) / get_world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows [B, ...] of all ranks, [W * B, ...], in the order of the ranks; gradients flow back to each.

    Every rank must call it, with the same shape. Its backward pass is a collective too: it adds up what the losses of
    all ranks say about the rows of this one, so that averaging the gradients of the parameters afterwards gives those
    of the mean loss.
    """
    gathered: Tensor = _GatherRows.apply(rows) if is_distributed() else rows
    return gathered


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks; gradients flow, as in `gather_rows`."""
    total: Tensor = _SumOverRanks.apply(tensor) if is_distributed() else tensor
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = all_reduce_sum_(gradient.contiguous().clone())
        mine: Tensor = total.split(ctx.num_rows)[get_rank()]
        return mine


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum_(gradient.contiguous().clone())


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the ranks. The same parameters must have one on every rank."""
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        if bucket and (_num_bytes(bucket) >= _BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
            _average_bucket_(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _average_bucket_(bucket)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _average_bucket_(tensors: list[Tensor]) -> None:
    """Average several tensors by one collective: thousands of small ones would cost more than their bytes."""
    flat = all_reduce_sum_(torch.cat([tensor.flatten() for tensor in tensors])).div_(get_world_size())
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_bytes(values: Tensor, device: torch.device | str) -> list[Tensor]:
    """Return the uint8 tensors of all ranks, of one length, on the CPU and in the order of the ranks.

    Args:
        values: uint8 [n] on the CPU.
        device: where the process group communicates.
    """
    if not is_distributed():
        return [values]
    parts = [torch.empty_like(values, device=device) for _ in range(get_world_size())]
    dist.all_gather(parts, values.to(device))
    return [part.cpu() for part in parts]


def gather_values(value: Any, device: torch.device | str) -> list[Any]:
    """Return the values of all ranks, on every rank, in the order of the ranks. As JSON: floats keep all their digits.

    Args:
        value: what JSON can hold; NaN and infinity too.
        device: where the process group communicates.
    """
    if not is_distributed():
        return [value]
    own = json.dumps(value).encode()
    lengths = [part.view(torch.int64) for part in gather_bytes(_as_bytes(len(own).to_bytes(8, sys.byteorder)), device)]
    longest = max(int(length) for length in lengths)
    parts = gather_bytes(_as_bytes(own.ljust(longest)), device)
    return [json.loads(bytes(part.tolist()[: int(length)])) for part, length in zip(parts, lengths, strict=True)]


def _as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def largest_of_ranks(value: int, device: torch.device | str) -> int:
    """Return the greatest of the ranks' numbers, on every rank."""
    if not is_distributed():
        return value
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


@torch.no_grad()
def from_main_process(tensor: Tensor) -> Tensor:
    """Give ``tensor`` the values that it has on the main process, in place, and return it; same shape on every rank."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def wait_for_all_ranks() -> None:
    """Return once every rank has called it."""
    if is_distributed():
        dist.barrier()
