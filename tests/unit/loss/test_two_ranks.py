"""Two processes, each with its own rows, give what one process gives with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov2_equi.loss.dino_clstoken_loss import DINOLoss
from dinov2_equi.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2_equi.loss.sinkhorn import sinkhorn_knopp

NUM_ROWS = 9
SPLITS = (4, 0)  # rank 0 gets this many rows; with 0 it has no masked patch at all


def all_logits() -> torch.Tensor:
    # Rank 1's logits are far above rank 0's, so that a maximum of one rank alone would overflow or underflow.
    logits = torch.randn(NUM_ROWS, 6, generator=torch.Generator().manual_seed(0))
    logits[4:] += 20.0
    return logits


def run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    results = {}
    for split in SPLITS:
        mine = all_logits()[:split] if rank == 0 else all_logits()[split:]
        dino, ibot = DINOLoss(6), iBOTPatchLoss(6)
        dino.update_center(mine)
        ibot.update_center(mine)
        results[split] = {
            "assignments": sinkhorn_knopp(mine, 0.1),
            "dino_center": dino.center,
            "ibot_center": ibot.center,
        }
    torch.save(results, Path(directory) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks_differ_from_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assignments = sinkhorn_knopp(all_logits(), 0.1)
    center = 0.1 * all_logits().mean(dim=0)
    for split in SPLITS:
        together = torch.cat([rank[split]["assignments"] for rank in ranks])
        # The logits over the temperature are of order 200: their float32 rounding is 1e-5 of a probability.
        torch.testing.assert_close(together, assignments, rtol=5e-5, atol=1e-7)
        for rank in ranks:
            torch.testing.assert_close(rank[split]["dino_center"], center.view(1, 6), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank[split]["ibot_center"], center.view(1, 1, 6), rtol=1e-5, atol=1e-6)
