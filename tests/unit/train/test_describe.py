"""The cost of a step: against formulas, against a step that is really run, and within what the branch may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.masking import draw_mask_sizes
from dinov2_equi.train.describe import Part, StepCost, describe_step, expected_masked_patches
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]
CONFIGS = Path(__file__).parents[3] / "configs"


def part(cost: StepCost, name: str, network: str = "student") -> Part:
    (found,) = [part for part in cost.parts if (part.name, part.network) == (name, network)]
    return found


# ------------------------------------------------------------------------------------------- what the branch may cost


@pytest.mark.parametrize(
    ("arch", "limit"), [("vit_large", 0.02), ("vit_base", 0.04), ("vit_small", 0.08)], ids=["L", "B", "S"]
)
@pytest.mark.parametrize(
    ("config", "overrides"),
    [("vitl14_equi.yaml", ()), (None, ("equi.family=se2", "equi.loss_weight=1"))],
    ids=["long recipe", "defaults"],
)
def test_branch_costs_more_than_promised(
    make_config: MakeConfig, arch: str, limit: float, config: str | None, overrides: tuple[str, ...]
) -> None:
    file = None if config is None else CONFIGS / config
    cost = describe_step(make_config(f"student.arch={arch}", *overrides, config_file=file))
    assert 0.005 < cost.branch_share <= limit  # a decoder of no cost would be a fault of the count


# ---------------------------------------------------------------------------------------------------- against formulas


def vit_operations(images: int, tokens: int, width: int, depth: int, patch: int) -> int:
    """Forward operations of a plain ViT on square images of tokens - 1 patches; two for a product and its sum."""
    embedding = 2 * (tokens - 1) * width * 3 * patch**2
    linear = 2 * tokens * width * (3 * width + width + 4 * width + 4 * width)  # q k v, output, feed-forward
    attention = 2 * 2 * tokens * tokens * width  # scores, and their use
    return images * (embedding + depth * (linear + attention))


def test_backbones_by_hand(make_config: MakeConfig) -> None:
    cost = describe_step(make_config("student.drop_path_rate=0"))
    global_patches, local_patches = 16, 4  # crops of 32 and 16 pixels, patches of 8
    sizes = {"width": 48, "depth": 3, "patch": 8}
    one_global = vit_operations(2, 1 + global_patches, **sizes)
    one_local = vit_operations(2, 1 + local_patches, **sizes)
    # The backward pass costs twice the forward pass, but for the embedding, which needs no gradient of the pixels.
    embedding = 2 * 2 * (global_patches + local_patches) * 48 * 3 * 64
    assert part(cost, "backbone").flops == 3 * (one_global + one_local) - embedding
    assert part(cost, "backbone", "teacher").flops == one_global


def test_heads_by_hand(make_config: MakeConfig) -> None:
    cfg = make_config("ibot.separate_head=true", "ibot.mask_ratio_min_max=[0.5,0.5]")
    cost = describe_step(cfg)
    in_dim = 48 - 12  # a quarter of the channels is equivariant
    one_row = 2 * (in_dim * 32 + 32 * 32 + 32 * 16 + 16 * 64)
    assert expected_masked_patches(cfg) == 4 * 8  # half of 8 crops, half of 16 patches
    assert part(cost, "DINO head").flops == 3 * 4 * one_row  # two global and two local crops
    assert part(cost, "DINO head", "teacher").flops == 2 * one_row
    assert part(cost, "iBOT head").flops == 3 * 8 * one_row  # 32 masked patches of 4 images
    assert part(cost, "iBOT head", "teacher").flops == 8 * one_row
    parameters = in_dim * 32 + 32 + 32 * 32 + 32 + 32 * 16 + 16 + 64 * 16 + 64
    assert part(cost, "DINO head").parameters == part(cost, "iBOT head").parameters == parameters


def test_shared_head_is_counted_twice(make_config: MakeConfig) -> None:
    cost = describe_step(make_config("ibot.separate_head=false"))
    assert part(cost, "iBOT head").parameters == 0
    assert part(cost, "iBOT head").flops > 0


def test_split_and_decoder_by_hand(make_config: MakeConfig) -> None:
    overrides = ("equi.projection_dim=64", "equi.dim=24", "ibot.mask_ratio_min_max=[0.5,0.5]")
    cost = describe_step(make_config(*overrides, "equi.decoder.width=32", "equi.decoder.depth=1"))
    cls_and_masked = 4 + 8  # of two global and two local crops; masked patches of an image
    assert part(cost, "split").flops == 3 * 2 * 48 * (cls_and_masked * 40 + 2 * 16 * 24)
    assert part(cost, "split", "teacher").flops == 2 * 48 * 40 * (2 + 8)
    assert part(cost, "split").parameters == 48 * 64 + 64
    n, steps, width = 16, 2, 32
    block = 2 * n * width * 12 * width + 2 * 2 * n * n * width
    forward = 2 * n * 2 * 24 * width + steps * (block + 2 * n * width * 3 * 64)
    assert part(cost, "decoder").flops == 3 * forward


def test_stochastic_depth_is_not_counted(make_config: MakeConfig) -> None:
    half, whole = (describe_step(make_config(f"student.drop_path_rate={rate}")).parts[0].flops for rate in (0.5, 0))
    assert 0.5 < half / whole < 0.55  # the patch embedding sees all images


def test_cost_of_an_image_depends_on_the_batch(make_config: MakeConfig) -> None:
    overrides = ("student.drop_path_rate=0", "ibot.mask_ratio_min_max=[0.5,0.5]")
    costs = [describe_step(make_config(*overrides, f"train.batch_size_per_gpu={n}")).flops for n in (4, 64)]
    assert costs[0] == costs[1]


def test_number_of_masked_patches_is_not_that_of_the_masks(make_config: MakeConfig) -> None:
    cfg = make_config("crops.global_crops_size=112", "train.batch_size_per_gpu=32")
    rng = np.random.default_rng(0)
    low, high = cfg.ibot.mask_ratio_min_max
    counts = [draw_mask_sizes(64, 14 * 14, 0.5, (low, high), rng).sum() for _ in range(20)]
    # Blocks that no longer fit leave a mask a few patches short.
    assert 0.93 < np.mean(counts) / expected_masked_patches(cfg) <= 1


# ------------------------------------------------------------------------------------------------- against a real step

NO_COUNTED_LOSS = ("dino.koleo_loss_weight=0", "train.centering=centering")
"""KoLeo compares all images by a matrix product, which is no part of the networks."""


def operations_of_a_step(cfg: Config, batch: Batch) -> float:
    """Return the operations for one image of a step that is computed, without those of the transform."""
    torch.manual_seed(0)
    model = SSLMetaArch(cfg).train()
    with FlopCounterMode(display=False) as transform:
        model._make_views(batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.forward_backward(batch, teacher_temp=0.05)
    total = counter.get_total_flops() - transform.get_total_flops()
    return float(total) / cfg.train.batch_size_per_gpu


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("equi.family=null", "equi.loss_weight=0"),
        ("equi.family=null", "equi.loss_weight=0", "equi.split_without_transform=true", "equi.projection_dim=64"),
        ("equi.loss_weight=0",),
        ("equi.projection_dim=64", "equi.dim=24", "equi.use_cls=true", "ibot.separate_head=true"),
        ("equi.projection_dim=64", "equi.source_2=teacher", "equi.use_cls=true"),
        ("dino.loss_weight=0", "ibot.loss_weight=0", "equi.source_2=teacher"),
        ("ibot.loss_weight=0", "crops.local_crops_number=0"),
        ("equi.decoder.type=upconv", "equi.num_steps=3"),
        ("equi.decoder.patch_fraction=0.5", "equi.decoder.shared=false"),
        ("equi.decoder.half_resolution=true", "equi.include_final=true"),
        ("equi.layer=1", "equi.projection_dim=64"),
        ("equi.target=theta",),
        ("equi.target=view_2",),
        ("equi.target=masked",),
        ("student.num_register_tokens=2", "student.ffn_layer=swiglu", "student.drop_path_rate=0.3"),
    ],
    ids=lambda overrides: " ".join(overrides) or "debug",
)
def test_parts_do_not_add_up_to_a_real_step(
    make_config: MakeConfig, make_batch: MakeBatch, overrides: tuple[str, ...]
) -> None:
    cfg = make_config(*NO_COUNTED_LOSS, *overrides)
    cost = describe_step(cfg)
    batch = make_batch(cfg)
    masks = torch.zeros_like(batch.masks)
    if cfg.ibot.loss_weight > 0:
        masks.view(-1)[: expected_masked_patches(cfg)] = True
    indices = masks.flatten().nonzero().flatten()
    weights = torch.full((len(indices),), 0.1)
    batch = dataclasses.replace(batch, masks=masks, mask_indices=indices, mask_weights=weights)
    assert cost.flops == pytest.approx(operations_of_a_step(cfg, batch), rel=1e-12)  # both are whole numbers


# ------------------------------------------------------------------------------------------------------------ the rest


def test_share_is_that_of_the_branch_over_the_step_without_it(make_config: MakeConfig) -> None:
    cost = describe_step(make_config("equi.projection_dim=64"))
    without = describe_step(make_config("equi.family=null", "equi.loss_weight=0"))
    assert cost.flops_without_branch == without.flops
    branch = sum(p.flops for p in cost.parts if p.name in ("split", "decoder"))
    assert cost.branch_share == pytest.approx(branch / without.flops, rel=1e-12)  # the order of a sum
    assert cost.step_increase == pytest.approx(cost.flops / without.flops - 1, rel=1e-12)
    assert without.branch_share == without.step_increase == 0


def test_teacher_that_only_the_branch_needs_is_part_of_it(make_config: MakeConfig) -> None:
    cost = describe_step(make_config("dino.loss_weight=0", "ibot.loss_weight=0", "equi.source_2=teacher"))
    assert part(cost, "backbone", "teacher").in_branch
    assert not part(describe_step(make_config("equi.source_2=teacher")), "backbone", "teacher").in_branch


def test_expander_is_forgotten(make_config: MakeConfig) -> None:
    cost = describe_step(make_config("vicreg.loss_weight=1", "vicreg.expander_dim=32", "vicreg.expander_nlayers=2"))
    assert part(cost, "VICReg expander").flops == 3 * 2 * 2 * (36 * 32 + 32 * 32)  # two views


def test_largest_model_allocates_its_weights(make_config: MakeConfig) -> None:
    overrides = ("student.arch=vit_giant2", "equi.family=null", "equi.loss_weight=0", "student.ffn_layer=swiglufused")
    cost = describe_step(make_config(*overrides, config_file=CONFIGS / "vitl14_equi.yaml"))
    assert part(cost, "backbone").parameters == pytest.approx(1.135e9, rel=2e-3)  # 1.1 billion, as published
