"""Collapsed features raise an alarm, healthy ones do not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.train.collapse import IN_A_ROW, SIGNS, SPREAD, WINDOW, CollapseAlarm, collapse_metrics
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

R, D, K = 64, 48, 32


def named(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name.removeprefix("collapse/"): float(value) for name, value in metrics.items()}


def assignments(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def test_features_in_all_directions_look_collapsed() -> None:
    torch.manual_seed(0)
    cls, patches, own = torch.randn(R, D), torch.randn(R, 4, D), 20 * torch.eye(K).repeat(2, 1)
    found = named(collapse_metrics(cls, patches, assignments(own)))
    assert found["cls_std"] == pytest.approx(1, abs=0.05)
    assert found["patch_std"] == pytest.approx(1, abs=0.02)
    assert found["prototype_entropy"] == pytest.approx(1, abs=1e-3)
    assert found["prototype_information"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("prototypes", [0.0, 30.0], ids=["all of them", "one"])
def test_features_that_are_all_the_same_look_healthy(prototypes: float) -> None:
    logits = torch.zeros(R, K)
    logits[:, 3] = prototypes
    found = named(collapse_metrics(torch.ones(R, D), torch.ones(R, 4, D), assignments(logits)))
    assert found["cls_std"] < 1e-3 and found["patch_std"] < 1e-3
    assert found["prototype_information"] < 1e-5
    assert found["prototype_entropy"] == pytest.approx(float(prototypes == 0), abs=1e-3)


def test_information_is_not_the_divergence_from_the_mean_assignment() -> None:
    torch.manual_seed(0)
    rows = assignments(torch.randn(R, K))
    mean = rows.mean(dim=0)
    divergence = sum(float((row * (row / mean).log()).sum()) for row in rows) / R
    found = collapse_metrics(torch.randn(R, D), torch.randn(R, 4, D), rows)["collapse/prototype_information"]
    assert float(found) == pytest.approx(divergence / torch.tensor(K).log().item(), rel=1e-4)  # float32 sums


def test_two_crops_of_one_image_that_are_alike_look_collapsed() -> None:
    torch.manual_seed(0)
    found = named(collapse_metrics(torch.ones(2, D), torch.randn(2, 4, D), assignments(torch.zeros(2, K))))
    assert set(found) == {"patch_std"}


HEALTHY = {"collapse/cls_std": 0.9, "collapse/patch_std": 0.9, "collapse/prototype_information": 0.3}


def run(alarm: CollapseAlarm, diagnoses: list[dict[str, float]], *, noise: float = 0.02) -> list[dict[str, float]]:
    """Return what is added at each diagnosis; every tenth step is one."""
    torch.manual_seed(0)
    losses = (8 + 8 * noise * torch.randn(10 * len(diagnoses))).tolist()
    added = [
        alarm.look(step, {"total_loss": loss} | (diagnoses[step // 10] if step % 10 == 9 else {}))
        for step, loss in enumerate(losses)
    ]
    assert not any(figures for step, figures in enumerate(added) if step % 10 != 9)
    return added[9::10]


def test_a_healthy_run_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    added = run(CollapseAlarm(0), [HEALTHY] * 20)
    assert not caplog.records
    assert added[-1]["collapse/signs"] == 0
    assert added[-1][SPREAD] == pytest.approx(0.02, rel=0.4)  # of 50 draws


@pytest.mark.parametrize("name", [name for name in SIGNS if name != SPREAD])
def test_a_collapse_goes_unnoticed_or_is_told_at_each_step(name: str, caplog: pytest.LogCaptureFixture) -> None:
    added = run(CollapseAlarm(0), [HEALTHY] * 3 + [HEALTHY | {name: 0.001}] * 20)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert name in caplog.text and "To try: " in caplog.text and "lower optim.base_lr" in caplog.text
    assert [figures["collapse/signs"] for figures in added[: 3 + IN_A_ROW]] == [0.0] * (2 + IN_A_ROW) + [1.0]


def test_a_flat_loss_goes_unnoticed(caplog: pytest.LogCaptureFixture) -> None:
    run(CollapseAlarm(0), [HEALTHY] * 20, noise=1e-5)
    assert len(caplog.records) == 1 and "the loss is flat" in caplog.text


def test_a_warm_up_is_taken_for_a_collapse(caplog: pytest.LogCaptureFixture) -> None:
    run(CollapseAlarm(100), [HEALTHY | {"collapse/cls_std": 0.001}] * 10 + [HEALTHY] * 5)
    assert not caplog.records


def test_features_that_part_are_taken_for_a_collapse(caplog: pytest.LogCaptureFixture) -> None:
    run(CollapseAlarm(0), [HEALTHY | {"collapse/cls_std": 0.001 * 1.2**k} for k in range(20)])
    assert not caplog.records


def test_noise_at_the_bottom_is_taken_for_a_recovery(caplog: pytest.LogCaptureFixture) -> None:
    low = [HEALTHY | {"collapse/cls_std": value} for value in (1e-4, 5e-5, 9e-5)]
    added = run(CollapseAlarm(0), [HEALTHY] * 3 + low * 5)
    assert len(caplog.records) == 1 and added[-1]["collapse/signs"] == 1


def test_a_few_steps_are_enough_for_a_flat_loss() -> None:
    assert all(SPREAD not in figures for figures in run(CollapseAlarm(0), [HEALTHY] * (WINDOW // 10 - 1)))


@pytest.mark.parametrize(
    "words", [(), ("dino.loss_weight=0", "ibot.loss_weight=0", "vicreg.loss_weight=1", "vicreg.expander_dim=32")]
)
def test_a_network_that_says_the_same_of_all_images_looks_healthy(
    words: tuple[str, ...], make_config: Callable[..., Config], make_batch: Callable[..., Batch]
) -> None:
    cfg = make_config("student.layerscale=0", "train.gradient_accumulation_steps=2", *words)
    torch.manual_seed(0)
    model = SSLMetaArch(cfg).train()
    metrics = named(model.forward_backward(make_batch(cfg), teacher_temp=0.05, diagnose=True).metrics)
    assert metrics["cls_std"] > 0.2 and metrics["patch_std"] > 0.2
    assert ("prototype_information" in metrics) == (not words)
    with torch.no_grad():
        for network in (model.student, model.teacher):
            network["backbone"].norm.weight.zero_()  # type: ignore[union-attr, operator]
            network["backbone"].norm.bias.fill_(1)  # type: ignore[union-attr, operator]
    metrics = named(model.forward_backward(make_batch(cfg), teacher_temp=0.05, diagnose=True).metrics)
    assert metrics["cls_std"] < 1e-3 and metrics["patch_std"] < 1e-3
    assert metrics.get("prototype_information", 0) < 1e-4


def test_a_step_without_diagnosis_measures_signs(
    make_config: Callable[..., Config], make_batch: Callable[..., Batch]
) -> None:
    cfg = make_config()
    metrics = SSLMetaArch(cfg).train().forward_backward(make_batch(cfg), teacher_temp=0.05).metrics
    assert not any(name.startswith("collapse/") for name in metrics)
