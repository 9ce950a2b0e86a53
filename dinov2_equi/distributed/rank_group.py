"""The ranks of a run talking about files: over the CPU and in a group of their own, so that a thread may do it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from dinov2_equi.distributed.env import is_distributed

_PATIENCE = timedelta(hours=1)
"""How long a rank waits for another one to write its part of a checkpoint."""


class RankGroup:
    """All ranks, apart from the group in which they train. Every rank must make it, and make its calls in one order.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather_texts(self, text: str) -> list[str]:
        """Return the texts of all ranks, in their order, on every rank."""
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self._group)
        longest = max(int(length) for length in lengths)
        if longest == 0:
            return [""] * self.size
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, torch.cat([mine, mine.new_zeros(longest - len(mine))]), group=self._group)
        return [part[: int(length)].numpy().tobytes().decode() for part, length in zip(parts, lengths, strict=True)]


def rank_group() -> RankGroup | None:
    """Return a new group of all ranks, None in a single process; every rank must call it."""
    return RankGroup() if is_distributed() and dist.get_world_size() > 1 else None
