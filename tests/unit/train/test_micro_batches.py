"""A step in parts: the numbers of the whole batch, the memory of a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.layers.block import Block, MicroBatch, draw_subset
from dinov2_equi.train.acceleration import checkpoint_activations_, compile_blocks_
from dinov2_equi.train.micro_batches import random_state
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]

CPU = torch.device("cpu")
SHARP = "student.layerscale=0"
"""LayerScale makes fresh features nearly equal, and nothing that looks at several images would show."""
EVERYTHING = ("vicreg.loss_weight=1", "vicreg.expander_dim=32", "equi.decoder.type=upconv", "ibot.separate_head=true")


def step(
    make_config: MakeConfig, make_batch: MakeBatch, parts: int, *words: str, images: int = 8
) -> tuple[SSLMetaArch, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return model, losses and metrics, gradients, and the random state after a step of so many images."""
    sizes = (f"train.batch_size_per_gpu={images // parts}", f"train.gradient_accumulation_steps={parts}")
    cfg = make_config(SHARP, *words, *sizes)
    torch.manual_seed(1)
    model = SSLMetaArch(cfg).train()
    torch.manual_seed(2)
    output = model.forward_backward(make_batch(cfg), teacher_temp=0.05, diagnose=True)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model, output.losses | output.metrics, gradients, random_state(CPU)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(
    "words",
    [
        ("student.drop_path_rate=0",),
        ("student.drop_path_rate=0.4",),
        (*EVERYTHING, "student.drop_path_rate=0.4"),
        ("equi.source_2=teacher", "equi.use_cls=true", "student.drop_path_rate=0"),
        ("equi.layer=1", "equi.projection_dim=40", "train.centering=sinkhorn_knopp"),
        ("crops.local_crops_number=0", "equi.family=null", "equi.loss_weight=0"),
    ],
    ids=["default", "drop path", "everything", "teacher", "layer", "baseline"],
)
def test_a_step_in_parts_is_another_step(
    words: tuple[str, ...], parts: int, make_config: MakeConfig, make_batch: MakeBatch
) -> None:
    _, losses, gradients, after = step(make_config, make_batch, 1, *words)
    _, losses_in_parts, gradients_in_parts, after_parts = step(make_config, make_batch, parts, *words)
    assert losses.keys() == losses_in_parts.keys() and gradients.keys() == gradients_in_parts.keys()
    for name, loss in losses.items():  # the same sums in another order, in float32
        torch.testing.assert_close(losses_in_parts[name], loss, rtol=2e-5 if "rank" in name else 1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(gradients_in_parts[name], gradient, rtol=1e-4, atol=1e-5 * size + 1e-8, msg=name)
    assert torch.equal(after, after_parts)


def test_recomputed_activations_do_not_go_with_parts(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    words = ("student.drop_path_rate=0.4",)
    _, _, expected, _ = step(make_config, make_batch, 2, *words)
    cfg = make_config(SHARP, *words, "train.gradient_accumulation_steps=2")
    torch.manual_seed(1)
    model = SSLMetaArch(cfg).train()
    checkpoint_activations_(model)
    torch.manual_seed(2)
    model.forward_backward(make_batch(cfg), teacher_temp=0.05)
    for name, gradient in expected.items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient), name


def test_a_part_passes_more_images_than_its_own(
    make_config: MakeConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[int, int], ...]] = []
    original = Block.forward

    def forward(block: Block, x: Tensor, layout: tuple[tuple[int, int], ...]) -> Tensor:
        seen.append(layout)
        return original(block, x, layout)

    monkeypatch.setattr(Block, "forward", forward)
    model, *_ = step(make_config, make_batch, 4, "equi.decoder.type=upconv")
    crops = {images for layout in seen for images, _ in layout}
    assert crops == {4}  # two images, two global or two local crops of each
    depth = len(model.student["backbone"].block_list())  # type: ignore[operator]
    assert len(seen) == 4 * 3 * depth  # each part: teacher, student, student again
    assert all(block.micro_batch is None for block in model.student["backbone"].block_list())  # type: ignore[operator]


def test_gradients_of_the_step_before_are_added_twice(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    model, _, once, _ = step(make_config, make_batch, 2)
    once = {name: gradient.clone() for name, gradient in once.items()}
    torch.manual_seed(2)
    model.forward_backward(make_batch(model.cfg), teacher_temp=0.05)
    for name, gradient in once.items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-5, atol=1e-7)  # sums in another order


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_parts_drop_other_images_than_the_whole(rate: float) -> None:
    layout, images, parts = ((6, 3), (12, 2)), 3, 2  # of each part: two global and four local crops of three images
    generator = torch.get_rng_state()
    rows, scale, _ = draw_subset(tuple((n * parts, t) for n, t in layout), rate, CPU)
    values = torch.arange(6 * parts * 3 + 12 * parts * 2)
    kept_of_whole, kept_of_parts, factors = set(values[rows].tolist()), [], set()
    for index in range(parts):
        torch.set_rng_state(generator)
        rows_of_part, scale_of_part, kept = draw_subset(layout, rate, CPU, MicroBatch(index, parts, images))
        assert sum(n * t for n, t in kept) == len(rows_of_part) == len(scale_of_part)
        global_rows = values[:36].view(2, parts, images, 3)[:, index].flatten()  # crop-major
        local_rows = values[36:].view(4, parts, images, 2)[:, index].flatten()
        kept_of_parts += torch.cat([global_rows, local_rows])[rows_of_part].tolist()
        factors |= set(scale_of_part.flatten().tolist())
    assert sorted(kept_of_parts) == sorted(kept_of_whole)
    assert factors == set(scale.flatten().tolist())


def test_shapes_that_change_are_compiled_anew(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, make_batch: MakeBatch
) -> None:
    model, *_ = step(make_config, make_batch, 2, "student.drop_path_rate=0.1")
    assert not compile_blocks_(model, torch.device("cpu"))
    assert "set student.drop_path_rate=0" in caplog.text


def test_a_batch_of_another_size_is_divided_wrongly(make_config: MakeConfig, make_batch: MakeBatch) -> None:
    cfg = make_config("train.gradient_accumulation_steps=2")
    batch = make_batch(replace(cfg, train=replace(cfg.train, batch_size_per_gpu=3, gradient_accumulation_steps=1)))
    with pytest.raises(AssertionError):
        SSLMetaArch(cfg).forward_backward(batch, teacher_temp=0.05)
