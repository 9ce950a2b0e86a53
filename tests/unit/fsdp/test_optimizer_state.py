"""AdamW through a checkpoint and back, exactly, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_equi.fsdp.checkpoint import CheckpointStore, flatten_optimizer, restore_optimizer_, sha256_of_tensors


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make_optimizer(model: nn.Module, num_groups: int = 2, **options: Any) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    groups = [named[start::num_groups] for start in range(num_groups)]
    return torch.optim.AdamW(
        [{"params": [p for _, p in group], "names": [name for name, _ in group]} for group in groups], lr=0.1, **options
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def trained(num_groups: int = 2, **options: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = make_model()
    optimizer = make_optimizer(model, num_groups, **options)
    train(model, optimizer, range(3))
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, options: dict[str, bool], num_groups: int
) -> None:
    whole, whole_optimizer = trained(**options)
    store = CheckpointStore(tmp_path)
    tensors, state = flatten_optimizer(whole_optimizer)
    store.save(3, {"model": whole.state_dict(), "optimizer": tensors}, {"optimizer": state})
    train(whole, whole_optimizer, range(3, 6))

    resumed = make_model()
    loaded = store.load()
    resumed.load_state_dict(loaded.tensors["model"])
    optimizer = make_optimizer(resumed, num_groups, **options)
    restore_optimizer_(optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(resumed, optimizer, range(3, 6))

    assert sha256_of_tensors(resumed.state_dict()) == sha256_of_tensors(whole.state_dict())
    assert sha256_of_tensors(flatten_optimizer(optimizer)[0]) == sha256_of_tensors(
        flatten_optimizer(whole_optimizer)[0]
    )


def test_tensors_are_named_after_state_and_parameter() -> None:
    tensors, state = flatten_optimizer(trained()[1])
    parameters = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert set(tensors) == {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters}
    assert state == {"class": "AdamW", "names": sorted(parameters), "without_state": []}


def test_an_optimizer_before_its_first_step_comes_back_empty() -> None:
    tensors, state = flatten_optimizer(make_optimizer(make_model()))
    assert tensors == {}
    _, optimizer = trained()
    restore_optimizer_(optimizer, tensors, state)
    assert flatten_optimizer(optimizer)[0] == {}


def test_a_parameter_that_never_had_a_gradient_stays_without_state() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    model[2].weight.requires_grad_(False)
    train(model, optimizer, range(2))
    tensors, state = flatten_optimizer(optimizer)
    assert state["without_state"] == ["2.weight"]
    _, restored = trained()
    restore_optimizer_(restored, tensors, state)
    assert flatten_optimizer(restored)[1]["without_state"] == ["2.weight"]


def test_restored_state_does_not_alias_the_checkpoint() -> None:
    tensors, state = flatten_optimizer(trained()[1])
    before = sha256_of_tensors(tensors)
    model = make_model()
    optimizer = make_optimizer(model)
    restore_optimizer_(optimizer, tensors, state)
    train(model, optimizer, range(2))
    assert sha256_of_tensors(tensors) == before


def test_hyper_parameters_stay_those_of_the_optimizer() -> None:
    tensors, state = flatten_optimizer(trained()[1])
    optimizer = make_optimizer(make_model(), betas=(0.5, 0.6))
    optimizer.param_groups[0]["lr"] = 0.7
    names = [group["names"] for group in optimizer.param_groups]
    restore_optimizer_(optimizer, tensors, state)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert [group["names"] for group in optimizer.param_groups] == names


def drop(key: str) -> Any:
    return lambda tensors, state: tensors.pop(key)


def reshape(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    tensors["exp_avg/0.weight"] = tensors["exp_avg/0.weight"].t()


def scalar_step(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    tensors["step/0.bias"] = torch.ones(4)


def other_dtype(key: str) -> Any:
    return lambda tensors, state: tensors.update({key: tensors[key].double()})


def other_class(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["class"] = "SGD"


def other_names(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["names"] = [*state["names"][1:], "3.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("exp_avg_sq/2.bias"), r"1 missing in the checkpoint \['exp_avg_sq/2.bias'\]"),
        (lambda tensors, state: tensors.update({"exp_avg/new": torch.ones(1)}), r"1 unknown here \['exp_avg/new'\]"),
        (reshape, r"expected shape \(4, 3\) for exp_avg of '0.weight', the checkpoint holds \(3, 4\)"),
        (scalar_step, r"expected shape \(\) for step of '0.bias', the checkpoint holds \(4,\)"),
        (other_dtype("exp_avg/0.weight"), "expected torch.float32 for exp_avg of '0.weight'.*holds torch.float64"),
        (other_dtype("step/0.bias"), "expected torch.float32 for step of '0.bias'.*holds torch.float64"),
        (lambda tensors, state: state.update(names=[1, None]), r"expected a list of names as 'names'.*\[1, None\]"),
        (lambda tensors, state: state.update(without_state=3), "expected a list of names as 'without_state'"),
        (other_class, r"optimiser class differ.*'AdamW'.*'SGD'"),
        (other_names, r"parameters of the optimiser differ.*'0.bias'.*'3.weight'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(damage: Any, message: str) -> None:
    tensors, state = flatten_optimizer(trained()[1])
    damage(tensors, state)
    _, optimizer = trained()
    before = sha256_of_tensors(flatten_optimizer(optimizer)[0])
    with pytest.raises(ValueError, match=message):
        restore_optimizer_(optimizer, tensors, state)
    assert sha256_of_tensors(flatten_optimizer(optimizer)[0]) == before


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.optim.AdamW, got SGD"):
        flatten_optimizer(torch.optim.SGD(make_model().parameters(), lr=0.1))


def test_groups_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="group 0 to hold the 'names' of its 4 parameters"):
        flatten_optimizer(torch.optim.AdamW(make_model().parameters()))
