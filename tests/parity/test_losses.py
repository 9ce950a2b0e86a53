"""Losses and the projection head give the numbers of the official DINOv2 code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_equi.layers.dino_head import DINOHead
from dinov2_equi.loss.dino_clstoken_loss import DINOLoss
from dinov2_equi.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2_equi.loss.koleo_loss import KoLeoLoss

RELATIVE = 1e-6  # a few float32 roundings


@pytest.fixture(scope="module")
def recorded(load_reference: Callable[[str], Any]) -> dict[str, Any]:
    return load_reference("losses.pt")


@pytest.mark.parametrize(("name", "loss"), [("dino_center", DINOLoss(32)), ("ibot_center", iBOTPatchLoss(32))])
def test_centring_differs(recorded: dict[str, Any], name: str, loss: DINOLoss | iBOTPatchLoss) -> None:
    call = recorded[name]
    loss.center.copy_(call["center_before"])
    probs = loss.softmax_center_teacher(call["teacher_logits"], call["teacher_temp"])
    torch.testing.assert_close(probs, call["probs"], rtol=RELATIVE, atol=1e-9)
    torch.testing.assert_close(loss.center, call["center_before"], rtol=0, atol=0)
    loss.update_center(call["teacher_logits"])
    torch.testing.assert_close(loss.center, call["center_after"], rtol=RELATIVE, atol=1e-8)


@pytest.mark.parametrize(("name", "loss"), [("dino_sinkhorn", DINOLoss(32)), ("ibot_sinkhorn", iBOTPatchLoss(32))])
def test_sinkhorn_is_not_finite_where_the_official_code_overflows(
    recorded: dict[str, Any], name: str, loss: DINOLoss | iBOTPatchLoss
) -> None:
    call = recorded[name]
    assert call["probs"].isnan().all()  # exp(9.9 / 0.05) exceeds float32
    expected = (call["teacher_logits"].double() / call["teacher_temp"]).exp()
    for _ in range(call["n_iterations"]):
        expected = expected / expected.sum(dim=0, keepdim=True)
        expected = expected / expected.sum(dim=1, keepdim=True)
    probs = loss.sinkhorn_knopp_teacher(call["teacher_logits"], call["teacher_temp"], call["n_iterations"])
    # The logits over the temperature are of order 200, so their float32 rounding alone is 1e-5 of a probability.
    torch.testing.assert_close(probs.double(), expected, rtol=5e-5, atol=1e-12)


def test_dino_cross_entropy_differs(recorded: dict[str, Any]) -> None:
    call = recorded["dino_ce"]
    loss = DINOLoss(32, student_temp=call["student_temp"])(call["student_logits"], call["teacher_probs"])
    torch.testing.assert_close(loss, call["loss"], rtol=RELATIVE, atol=0)


def test_ibot_cross_entropy_differs(recorded: dict[str, Any]) -> None:
    call = recorded["ibot_ce_masked"]
    loss = iBOTPatchLoss(32, student_temp=call["student_temp"]).forward_masked(
        call["student_logits"], call["teacher_probs"], call["masks_weight"], num_samples=call["masks"].shape[0]
    )
    torch.testing.assert_close(loss, call["loss"], rtol=RELATIVE, atol=0)


def test_koleo_differs(recorded: dict[str, Any]) -> None:
    call = recorded["koleo"]
    torch.testing.assert_close(KoLeoLoss()(call["embeddings"]), call["loss"], rtol=RELATIVE, atol=0)


def test_projection_head_differs(recorded: dict[str, Any]) -> None:
    call = recorded["dino_head"]
    head = DINOHead(**call["args"])
    head.load_state_dict(call["state_dict"])
    output: Tensor = head(call["input"])
    # Logits of order 0.1 whose terms are of order 0.1 too: an absolute tolerance, single ones are near zero.
    torch.testing.assert_close(output, call["output"], rtol=RELATIVE, atol=2e-7)
