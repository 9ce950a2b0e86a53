"""Micro-batches of sharded networks: parameters are gathered as seldom as the strategy allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.checkpoint import sha256_of_tensors
from dinov2_equi.fsdp.sharding import is_sharded, local_part
from dinov2_equi.layers.block import Block
from dinov2_equi.train import micro_batches
from dinov2_equi.train.sharding import plan_sharding, shard_model_
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from tests.ranks import in_a_group

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]
PARTS = 4


def step_on_two_ranks(cfg: Config, batch: Batch, folder: Path, *, is_plain: bool) -> tuple[int, int, list[str]]:
    """Return how often a step gathers and reduces, and the hashes of the gradients of both ranks.

    A plain step lets parameters go after each part.
    """
    folder.mkdir()

    def run(rank: int) -> None:
        if is_plain:
            micro_batches.keep_gathered_after_backward = lambda *_: None  # of this process alone
        torch.manual_seed(1)
        model = SSLMetaArch(cfg).train()
        shard_model_(model, plan_sharding(cfg, torch.device("cpu")))
        with CommDebugMode() as seen:
            model.forward_backward(batch, teacher_temp=0.05)
        assert all(is_sharded(p) for p in model.student["backbone"].parameters())  # nothing stays whole after a step
        gradients = {n: local_part(p.grad).contiguous() for n, p in model.named_parameters() if p.grad is not None}
        counts = {str(operation): count for operation, count in seen.get_comm_counts().items()}
        gathers = sum(count for name, count in counts.items() if "all_gather" in name or "allgather" in name)
        reductions = sum(count for name, count in counts.items() if "reduce_scatter" in name)
        (folder / f"{rank}.json").write_text(json.dumps([gathers, reductions, sha256_of_tensors(gradients)]))

    in_a_group(2, folder, run)
    (gathers, reductions, first), (_, _, second) = (json.loads((folder / f"{r}.json").read_text()) for r in range(2))
    return gathers, reductions, [first, second]


@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD"])
def test_each_micro_batch_gathers_again_what_is_there(
    strategy: str, make_config: Callable[..., Config], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    sizes = ("train.batch_size_per_gpu=1", f"train.gradient_accumulation_steps={PARTS}")
    owners = ("student", "teacher")
    words = (f"compute_precision.{owner}.backbone.sharding_strategy={strategy}" for owner in owners)
    cfg = make_config("student.drop_path_rate=0.4", *sizes, *words)
    batch = make_batch(cfg)
    gathers, reductions, gradients = step_on_two_ranks(cfg, batch, tmp_path / "kept", is_plain=False)
    plain_gathers, plain_reductions, plain_gradients = step_on_two_ranks(cfg, batch, tmp_path / "plain", is_plain=True)
    assert gradients == plain_gradients
    assert reductions == plain_reductions > 0
    blocks = [module for module in SSLMetaArch(cfg).student["backbone"].modules() if isinstance(module, Block)]
    modules = len(blocks) + 1  # and what is around them
    spared = modules * (PARTS - 1) if strategy == "SHARD_GRAD_OP" else 0
    assert plain_gathers - gathers == spared
