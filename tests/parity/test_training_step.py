"""One whole training step of the meta-architecture against the recorded step of the official code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.fsdp.ema import update_ema_
from dinov2_equi.models.weights import load_exact
from dinov2_equi.train.outputs import StepOutput
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

STEPS = ["step_centering.pt", "step_sinkhorn_separate.pt"]
LOSS_TOLERANCE = 1e-5  # relative, fp32: the sums run in another order
GRADIENT_TOLERANCE = 1e-4  # relative norm: backward sums run in another order as well
EMA_TOLERANCE = 1e-6  # one multiply-add in fp32


@dataclasses.dataclass
class Case:
    """A recorded step, and the same step of ours."""

    reference: dict[str, Any]
    model: SSLMetaArch
    output: StepOutput


def _config(reference: dict[str, Any]) -> Config:
    """Return the recorded settings, with the crops taken as they are: the recorded ones are already normalised."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), reference["config"]))
    assert isinstance(config, Config)
    config.data.mean, config.data.std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return config


def _batch(recorded: dict[str, Any]) -> Batch:
    return Batch(
        global_crops=recorded["collated_global_crops"],
        local_crops=recorded["collated_local_crops"],
        masks=recorded["collated_masks"],
        mask_indices=recorded["mask_indices_list"],
        mask_weights=recorded["masks_weight"],
        positions=torch.arange(len(recorded["collated_global_crops"]) // 2),
    )


@pytest.fixture(scope="module", params=STEPS)
def case(request: pytest.FixtureRequest, load_reference: Callable[[str], Any]) -> Case:
    reference = load_reference(request.param)
    model = SSLMetaArch(_config(reference)).train()
    load_exact(model, reference["state_dict"])
    output = model.forward_backward(_batch(reference["batch"]), teacher_temp=reference["teacher_temp"])
    return Case(reference, model, output)


def test_state_dict_has_the_names_of_the_official_meta_architecture(case: Case) -> None:
    assert set(case.model.state_dict()) == set(case.reference["state_dict"])


def test_every_logged_loss_equals_the_official_one(case: Case) -> None:
    assert set(case.output.losses) == {*case.reference["losses"], "total_loss"}
    for name, expected in case.reference["losses"].items():
        torch.testing.assert_close(case.output.losses[name], expected, rtol=LOSS_TOLERANCE, atol=0, msg=name)


def test_logged_total_is_the_loss_the_official_code_optimises(case: Case) -> None:
    expected = case.reference["optimised_total"]
    torch.testing.assert_close(case.output.losses["total_loss"], expected, rtol=LOSS_TOLERANCE, atol=0)


def test_every_student_gradient_equals_the_official_one(case: Case) -> None:
    gradients = {name: p.grad for name, p in case.model.student.named_parameters() if p.grad is not None}
    assert set(gradients) == set(case.reference["student_grads"])
    for name, expected in case.reference["student_grads"].items():
        error = (gradients[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.2e}"


def test_teacher_gets_no_gradient(case: Case) -> None:
    assert all(p.grad is None for p in case.model.teacher.parameters())


def test_teacher_after_ema_equals_the_official_one(case: Case) -> None:
    update_ema_(case.model.teacher, case.model.student, 0.9)
    state = case.model.teacher.state_dict()
    assert set(state) == set(case.reference["teacher_after_ema_0p9"])
    for name, expected in case.reference["teacher_after_ema_0p9"].items():
        torch.testing.assert_close(state[name], expected, rtol=0, atol=EMA_TOLERANCE, msg=name)
