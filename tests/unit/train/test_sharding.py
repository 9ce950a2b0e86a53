"""DINOv2's `compute_precision` keys as FSDP2 carries them out, network by network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.sharding import is_sharded, local_part
from dinov2_equi.layers.block import Block
from dinov2_equi.train import build
from dinov2_equi.train.sharding import plan_sharding, shard_model_
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.whole import build_without_memory, materialize_sharded_
from tests.ranks import in_a_group

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]
MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]
CPU = torch.device("cpu")
SEPARATE = "ibot.separate_head=true"


def of_both(key: str, value: str) -> tuple[str, str]:
    """Return the words that give a key below `compute_precision` a value, for student and teacher."""
    return (f"compute_precision.student.{key}={value}", f"compute_precision.teacher.{key}={value}")


def sharded_model(cfg: Config) -> SSLMetaArch:
    torch.manual_seed(1)
    model = SSLMetaArch(cfg).train()
    shard_model_(model, plan_sharding(cfg, CPU))
    return model


def placements(network: nn.Module) -> set[object]:
    """Return how the parameters of a network lie over the ranks; "whole" for those that are not sharded."""
    return {p.placements if isinstance(p, DTensor) else "whole" for p in network.parameters()}


def test_a_network_is_spread_by_the_strategy_of_another(make_config: MakeConfig, tmp_path: Path) -> None:
    strategies = {"backbone": "hybrid", "dino_head": "NO_SHARD", "ibot_head": "FULL_SHARD"}
    words = [word for name, strategy in strategies.items() for word in of_both(f"{name}.sharding_strategy", strategy)]
    cfg = make_config(SEPARATE, "vicreg.loss_weight=1", "vicreg.expander_dim=32", *words)
    expected = {"backbone": {(Replicate(), Shard(0))}, "dino_head": {"whole"}, "ibot_head": {(Shard(0),)}}

    def run(rank: int) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # two machines
        model = sharded_model(cfg)
        for networks in (model.student, model.teacher):
            assert {name: placements(networks[name]) for name in expected} == expected
            blocks = [module for module in networks["backbone"].modules() if isinstance(module, Block)]
            assert blocks and all(isinstance(block, FSDPModule) for block in blocks)
        assert model.equi is not None and model.expander is not None
        # These have no keys and follow the student's backbone.
        assert placements(model.equi.objective.decoder) == placements(model.expander) == expected["backbone"]
        part = next(model.student["backbone"].parameters())
        assert isinstance(part, DTensor) and part.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]

    in_a_group(4, tmp_path, run)


def is_rounded_to_bf16(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.bfloat16().float())


def test_number_formats_of_parameters_and_sums_are_not_those_of_the_keys(
    make_config: MakeConfig, make_batch: MakeBatch, tmp_path: Path
) -> None:
    # fp16 is gathered in bf16 and summed in fp32, as said in the log.
    formats = {"backbone": ("bf16", "bf16"), "dino_head": ("fp32", "bf16"), "ibot_head": ("fp16", "fp16")}
    words = [
        f"compute_precision.student.{name}.mixed_precision.{key}={value}"
        for name, pair in formats.items()
        for key, value in zip(("param_dtype", "reduce_dtype"), pair, strict=True)
    ]
    words += [f"compute_precision.teacher.{name}.mixed_precision.param_dtype=fp32" for name in formats]
    cfg = make_config(SEPARATE, "compute_precision.autocast=bf16", *words)
    batch = make_batch(cfg)

    def run(rank: int) -> None:
        batch.global_crops.add_(0.1 * rank)  # the same images give the same gradients, whose mean is not rounded
        model = sharded_model(cfg)
        used: dict[str, set[torch.dtype]] = {}

        def note(owner: str) -> Callable[..., None]:
            return lambda linear, _: used.setdefault(owner, set()).add(linear.weight.dtype)

        for owner, networks in (("student", model.student), ("teacher", model.teacher)):
            for name, network in networks.items():
                for linear in (module for module in network.modules() if type(module) is nn.Linear):
                    linear.register_forward_pre_hook(note(f"{owner}.{name}"))
        model.forward_backward(batch, teacher_temp=0.05)
        half, whole = {torch.bfloat16}, {torch.float32}
        student = {"student.backbone": half, "student.dino_head": whole, "student.ibot_head": half}
        assert used == student | {f"teacher.{name}": whole for name in formats}
        rounded = {}
        for name in formats:
            network = model.student[name]
            gradients = [local_part(p.grad) for p in network.parameters() if p.grad is not None]
            assert {p.dtype for p in network.parameters()} == {g.dtype for g in gradients} == whole
            rounded[name] = all(is_rounded_to_bf16(g) for g in gradients)
        assert rounded == {"backbone": True, "dino_head": True, "ibot_head": False}
        assert all(is_sharded(p) for p in model.teacher.parameters())  # nothing of it waits for a backward pass

    in_a_group(2, tmp_path, run)


def test_a_rank_holds_the_whole_model_before_it_is_sharded(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(SEPARATE)
    plain = SSLMetaArch.__init__

    def run(rank: int) -> None:
        places: list[str] = []

        def noted(model: SSLMetaArch, *arguments: object) -> None:
            places.append(torch.empty(0).device.type)
            plain(model, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(SSLMetaArch, "__init__", noted)
        plan = plan_sharding(cfg, CPU)
        model = build_without_memory(cfg)
        materialize_sharded_(model, plan, CPU, lambda: build._with_initial_weights(cfg, resumes=False))
        assert places == (["meta", "cpu"] if rank == 0 else ["meta"])
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        sizes = [(local_part(p).numel(), p.numel()) for p in model.parameters()]
        assert sum(own for own, _ in sizes) < 0.6 * sum(total for _, total in sizes)  # half, and what stays whole

    in_a_group(2, tmp_path, run)
