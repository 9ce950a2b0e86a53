"""The baseline with the projection: `equi.split_without_transform`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]

PROJECTED = (
    "equi.projection_dim=64",
    "equi.dim=24",
    "student.drop_path_rate=0",
    "vicreg.loss_weight=1",
    "vicreg.expander_dim=32",
)
BASELINE = ("equi.family=null", "equi.loss_weight=0", "equi.split_without_transform=true")


def build(make_config: MakeConfig, *overrides: str) -> SSLMetaArch:
    torch.manual_seed(0)
    return SSLMetaArch(make_config(*PROJECTED, *overrides)).train()


def test_baseline_has_other_networks_than_the_run_with_the_branch(make_config: MakeConfig) -> None:
    baseline, branch = build(make_config, *BASELINE), build(make_config)
    for name in ("student", "teacher", "expander"):
        first, second = (getattr(model, name).state_dict() for model in (baseline, branch))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert baseline.equi is None


def test_baseline_is_plain_dinov2_without_the_key(make_config: MakeConfig) -> None:
    plain = build(make_config, "equi.family=null", "equi.loss_weight=0")
    assert "feature_split" not in plain.student


def test_losses_of_the_baseline_see_the_equivariant_channels(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    model = build(make_config, *BASELINE)
    batch = make_batch(model.cfg)
    losses = model.forward_backward(batch, teacher_temp=0.05).losses
    projection = model.student["feature_split"].projection
    gradient = projection.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert gradient[:40].abs().sum() > 0
    assert gradient[40:].abs().sum() == 0  # the 24 equivariant channels are the last
    assert "equi_loss" not in losses


def test_crops_of_the_baseline_are_transformed(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    """The transform-only control differs from the baseline in the second view, and so do their losses."""
    losses = []
    for overrides in (BASELINE, ("equi.loss_weight=0",), ("equi.loss_weight=0", "equi.family=rotation")):
        model = build(make_config, *overrides)
        losses.append(model.forward_backward(make_batch(model.cfg), teacher_temp=0.05).losses["total_loss"])
    assert losses[0] != losses[1] != losses[2]
    plain = build(make_config, *BASELINE)
    still = build(make_config, "equi.loss_weight=0", "equi.family=rotation", "equi.max_rotation_deg=0")
    first, second = (
        model.forward_backward(make_batch(model.cfg), teacher_temp=0.05).losses["total_loss"]
        for model in (plain, still)
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)  # a rotation by 0 resamples, with rounding
