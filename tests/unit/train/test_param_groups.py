"""Parameter groups against DINOv2's tables, and by role on networks whose names give nothing away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov2_equi.equi.decoders.upconv import UpconvDecoder
from dinov2_equi.layers.dino_head import DINOHead
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.train.param_groups import ParamRole, apply_schedule_, build_param_groups, param_roles
from dinov2_equi.train.schedules import StepValues

TABLES = Path(__file__).parents[2] / "parity" / "reference" / "tables.json"
DECAY, PATCH_EMBED = 0.9, 0.2  # the factors that the tables were recorded with


def tiny_backbone(**changes: Any) -> nn.Module:
    arguments = {"img_size": 32, "patch_size": 16, "init_values": 1e-5, "num_register_tokens": 2}
    return build_backbone("vit_test_tiny", **(arguments | changes))


def tiny_head() -> DINOHead:
    return DINOHead(32, 8, hidden_dim=16, bottleneck_dim=4)


def roles_of(**modules: nn.Module) -> dict[str, ParamRole]:
    return param_roles(modules, layerwise_decay=DECAY, patch_embed_lr_mult=PATCH_EMBED)


def groups_of(**modules: nn.Module) -> list[dict[str, Any]]:
    return build_param_groups(modules, layerwise_decay=DECAY, patch_embed_lr_mult=PATCH_EMBED)


@pytest.mark.parametrize("arch", ["vit_small", "vit_large"])
def test_backbone_equals_the_reference_table(arch: str) -> None:
    with torch.device("meta"):  # only names and roles matter
        backbone = build_backbone(arch, img_size=518, patch_size=14, init_values=1e-5, block_chunks=0)
    expected = {
        f"backbone.{row['name']}": ParamRole(row["lr_multiplier"], row["wd_multiplier"], row["is_last_layer"])
        for row in json.loads(TABLES.read_text())["param_groups"][arch]
    }
    assert roles_of(backbone=backbone) == expected


@pytest.mark.parametrize("block_chunks", [0, 1, 2, 3])
def test_chunked_blocks_get_the_multipliers_of_flat_ones(block_chunks: int) -> None:
    flat, chunked = (
        roles_of(backbone=tiny_backbone(block_chunks=0)),
        roles_of(backbone=tiny_backbone(block_chunks=block_chunks)),
    )
    assert sorted(map(str, flat.values())) == sorted(map(str, chunked.values()))
    name = next(name for name in chunked if name.endswith("2.mlp.fc1.weight"))
    assert chunked[name].lr_multiplier == pytest.approx(DECAY)


def test_register_tokens_are_embeddings_and_decayed() -> None:
    role = roles_of(backbone=tiny_backbone())["backbone.register_tokens"]
    assert role == ParamRole(pytest.approx(DECAY**4), 1.0, False)


def test_decay_of_one_leaves_only_the_patch_embedding_slower() -> None:
    roles = param_roles({"backbone": tiny_backbone()}, layerwise_decay=1.0, patch_embed_lr_mult=0.5)
    slower = {name: role.lr_multiplier for name, role in roles.items() if role.lr_multiplier != 1.0}
    assert slower == {"backbone.patch_embed.proj.weight": 0.5, "backbone.patch_embed.proj.bias": 0.5}


def test_backbone_inside_a_wrapper_keeps_its_multipliers() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny_backbone()
            self.projection = nn.Linear(32, 32)

    roles = roles_of(student=Wrapper())
    assert roles["student.encoder.cls_token"].lr_multiplier == pytest.approx(DECAY**4)
    assert roles["student.projection.weight"].lr_multiplier == 1.0


def test_only_the_prototypes_of_a_head_are_last_layer() -> None:
    roles = roles_of(dino_head=tiny_head())
    last = {name for name, role in roles.items() if role.is_last_layer}
    assert last == {"dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}
    assert {role.lr_multiplier for role in roles.values()} == {1.0}


def test_a_layer_merely_called_last_layer_is_not_frozen() -> None:
    decoder = nn.ModuleDict({"last_layer": nn.Linear(4, 4)})
    assert not any(role.is_last_layer for role in roles_of(decoder=decoder).values())


def test_weight_decay_goes_by_type_not_by_name() -> None:
    module = nn.ModuleDict(
        {"blocks": nn.Linear(4, 4), "plain": nn.LayerNorm(4), "denormaliser": nn.Linear(4, 4), "rms": nn.RMSNorm(4)}
    )
    decayed = {name for name, role in roles_of(decoder=module).items() if role.wd_multiplier == 1.0}
    assert decayed == {"decoder.blocks.weight", "decoder.denormaliser.weight"}


def test_batch_norms_of_the_up_convolutions_are_not_decayed() -> None:
    decoder = UpconvDecoder(equi_dim=4, patch_size=4, width=8)
    decayed = {name for name, role in roles_of(decoder=decoder).items() if role.wd_multiplier == 1.0}
    assert decayed == {"decoder.input_projection.weight", "decoder.layers.0.weight", "decoder.layers.3.weight"}


def test_packed_attention_biases_are_not_decayed() -> None:
    roles = roles_of(decoder=nn.MultiheadAttention(8, 2))
    assert roles["decoder.in_proj_bias"].wd_multiplier == 0.0
    assert roles["decoder.in_proj_weight"].wd_multiplier == 1.0


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    modules = {"backbone": tiny_backbone(), "dino_head": tiny_head()}
    groups = groups_of(**modules)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in modules.values() for p in module.parameters())


def test_names_lie_beside_their_parameters() -> None:
    modules = nn.ModuleDict({"backbone": tiny_backbone(), "dino_head": tiny_head()})
    named = dict(modules.named_parameters())
    groups = groups_of(**dict(modules.items()))
    assert all(
        named[name] is parameter for g in groups for name, parameter in zip(g["names"], g["params"], strict=True)
    )


def test_groups_are_fused_by_role() -> None:
    groups = groups_of(backbone=tiny_backbone(), dino_head=tiny_head())
    roles = [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in groups]
    assert len(set(roles)) == len(roles)
    # Tokens, patch embedding and three blocks with and without decay, then norm and heads, then prototypes.
    assert len(groups) == 1 + 2 + 3 * 2 + 2 + 1


def test_parameter_shared_by_two_modules_is_trained_once() -> None:
    head = tiny_head()
    groups = groups_of(dino_head=head, ibot_head=head)
    names = [name for group in groups for name in group["names"]]
    assert all(name.startswith("dino_head.") for name in names)
    torch.optim.AdamW(groups)  # torch refuses a parameter in two groups


def test_frozen_parameters_are_left_out() -> None:
    head = tiny_head()
    head.last_layer.weight_g.requires_grad_(False)
    assert "dino_head.last_layer.weight_g" not in roles_of(dino_head=head)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        groups_of(backbone=tiny_backbone().requires_grad_(False))


@pytest.mark.parametrize("factors", [(0.0, 1.0), (1.0, 0.0), (-0.9, 1.0)])
def test_factors_that_would_stop_learning_are_refused(factors: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="use 1 to switch it off"):
        param_roles({"head": tiny_head()}, layerwise_decay=factors[0], patch_embed_lr_mult=factors[1])


def test_schedule_reaches_every_group_with_its_multipliers() -> None:
    optimizer = torch.optim.AdamW(groups_of(backbone=tiny_backbone(), dino_head=tiny_head()))
    apply_schedule_(optimizer, StepValues(lr=2.0, wd=0.3, momentum=0.9, teacher_temp=0.1, last_layer_lr=0.0))
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 2.0 * group["lr_multiplier"])
        assert group["weight_decay"] == 0.3 * group["wd_multiplier"]


def test_frozen_last_layer_does_not_move() -> None:
    head = tiny_head()
    before = {name: value.clone() for name, value in head.named_parameters()}
    optimizer = torch.optim.AdamW(groups_of(dino_head=head))
    head(torch.randn(5, 32)).square().sum().backward()
    apply_schedule_(optimizer, StepValues(lr=0.1, wd=0.5, momentum=0.9, teacher_temp=0.1, last_layer_lr=0.0))
    optimizer.step()
    moved = {name for name, value in head.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("last_layer")}
