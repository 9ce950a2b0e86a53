"""Compiled blocks and recomputed activations change how a step is computed, not what."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.layers.block import Block
from dinov2_equi.train import acceleration
from dinov2_equi.train.acceleration import checkpoint_activations_, compile_blocks_
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]


def gradients(model: SSLMetaArch, batch: Batch) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.manual_seed(0)  # the same images are dropped
    model.forward_backward(batch, teacher_temp=0.05)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model(make_config: MakeConfig) -> SSLMetaArch:
    torch.manual_seed(1)
    return SSLMetaArch(make_config("student.drop_path_rate=0.3", "equi.layer=1"))


@pytest.mark.parametrize("keep_products", [False, True])
def test_recomputed_activations_give_other_gradients(
    keep_products: bool, model: SSLMetaArch, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(model.cfg)
    expected = gradients(model, batch)
    checkpoint_activations_(model, keep_products=keep_products)
    calls = []
    original = Block._add_branches
    monkeypatch.setattr(Block, "_add_branches", lambda block, *args: calls.append(1) or original(block, *args))
    found = gradients(model, batch)
    depth = len(model.student["backbone"].block_list())
    assert len(calls) >= 3 * depth  # student forward and again, teacher
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_kept_products_are_computed_again(model: SSLMetaArch, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(model.cfg)
    flops = []
    for keep_products in (True, False):
        checkpoint_activations_(model, keep_products=keep_products)
        with FlopCounterMode(display=False) as counter:
            gradients(model, batch)
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1]


def test_compiled_blocks_give_other_gradients_or_names(
    model: SSLMetaArch, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs as they are traced, run by PyTorch: what a compiler makes of them is its own affair.
    compile_in_earnest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kw: compile_in_earnest(module, backend="eager", **kw))
    batch = make_batch(model.cfg)
    expected, names = gradients(model, batch), list(model.state_dict())
    assert compile_blocks_(model, torch.device("cpu"))
    found = gradients(model, batch)
    assert list(model.state_dict()) == names
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_compiler_that_fails_ends_the_run(
    model: SSLMetaArch, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr(acceleration.torch, "compile", broken)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks_(model, torch.device("cpu"))
    assert "no C compiler here" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert gradients(model, make_batch(model.cfg))


@pytest.mark.slow
def test_blocks_cannot_be_compiled_in_earnest(model: SSLMetaArch, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(model.cfg)
    expected = gradients(model, batch)
    assert compile_blocks_(model, torch.device("cpu"))
    found = gradients(model, batch)
    for name, gradient in expected.items():  # fused sums
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
