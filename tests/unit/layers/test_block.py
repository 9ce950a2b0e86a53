from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dinov2_equi.layers.block import Block, TokenNorm, draw_subset
from dinov2_equi.layers.layer_scale import LayerScale

WIDTH = 16
CPU = torch.device("cpu")


def make_block(drop_path: float = 0.0, init_values: float | None = 1.0) -> Block:
    torch.manual_seed(0)
    return Block(WIDTH, 2, drop_path=drop_path, init_values=init_values)


def test_packed_and_plain_input_differ() -> None:
    block = make_block().eval()
    x = torch.randn(3, 5, WIDTH)
    packed = block(x.flatten(0, 1), ((3, 5),))
    torch.testing.assert_close(block(x), packed.view(3, 5, WIDTH), rtol=0, atol=0)


def test_the_block_is_not_two_pre_norm_branches() -> None:
    block = make_block(init_values=0.3).eval()
    x = torch.randn(1, 4, WIDTH)
    layout = ((1, 4),)
    rows = x[0]
    rows = rows + block.ls1.gamma * block.attn(block.norm1(rows), layout)
    rows = rows + block.ls2.gamma * block.mlp(block.norm2(rows))
    torch.testing.assert_close(block(x)[0], rows, atol=1e-6, rtol=0)  # the same float32 operations


@pytest.mark.parametrize("init_values", [None, 0.0])
def test_layer_scale_is_built_without_a_value(init_values: float | None) -> None:
    block = make_block(init_values=init_values)
    assert not any(isinstance(module, LayerScale) for module in block.modules())


def test_stochastic_depth_acts_in_evaluation() -> None:
    x = torch.randn(8, 3, WIDTH)
    expected = make_block().eval()(x)
    torch.testing.assert_close(make_block(drop_path=0.9).eval()(x), expected, rtol=0, atol=0)


def test_drop_rate_zero_changes_training() -> None:
    x = torch.randn(8, 3, WIDTH)
    torch.testing.assert_close(make_block().train()(x), make_block().eval()(x), rtol=0, atol=0)


def count_changed_images(before: Tensor, after: Tensor) -> int:
    return int((before != after).flatten(1).any(dim=1).sum())


def test_the_number_of_dropped_images_is_wrong() -> None:
    block = make_block(drop_path=0.75).train()
    torch.nn.init.zeros_(block.ls2.gamma)  # attention alone is seen
    x = torch.randn(8, 3, WIDTH)
    changed = [count_changed_images(x, block(x)) for _ in range(10)]
    assert changed == [2] * 10


def test_the_second_branch_is_never_dropped() -> None:
    block = make_block(drop_path=0.75).train()
    torch.nn.init.zeros_(block.ls1.gamma)
    x = torch.randn(8, 3, WIDTH)
    assert count_changed_images(x, block(x)) == 2


def test_the_same_images_are_dropped_in_both_branches() -> None:
    block = make_block(drop_path=0.5).train()
    x = torch.randn(8, 3, WIDTH)
    # With one draw for both branches 4 images would change every time, with two draws 4 to 8.
    assert max(count_changed_images(x, block(x)) for _ in range(20)) > 4


def test_dropping_changes_the_expectation() -> None:
    block = make_block(drop_path=0.5).train()
    torch.nn.init.zeros_(block.ls2.gamma)
    x = torch.randn(4, 3, WIDTH)
    expected = make_block().eval()
    torch.nn.init.zeros_(expected.ls2.gamma)
    with torch.no_grad():
        mean = torch.stack([block(x) - x for _ in range(2000)]).mean(0)
        full = expected(x) - x
    # Each image is in or out with a spread of its own size: 5 standard errors of 1/sqrt(2000).
    assert (mean - full).abs().max() < 5 / 2000**0.5 * full.abs().max()


def test_a_dropped_image_gets_a_gradient_from_the_branch() -> None:
    block = make_block(drop_path=0.5).train()
    torch.nn.init.zeros_(block.ls2.gamma)
    x = torch.randn(4, 3, WIDTH, requires_grad=True)
    out = block(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    is_dropped = (out == x).flatten(1).all(dim=1)
    assert int(is_dropped.sum()) == 2
    assert (gradient[is_dropped] == 1).all()
    assert not (gradient[~is_dropped] == 1).all()


def test_the_subset_is_not_whole_images() -> None:
    torch.manual_seed(0)
    rows, scale, layout = draw_subset(((4, 3), (6, 2)), 0.5, CPU)
    assert layout == ((2, 3), (3, 2))
    images = [range(3 * i, 3 * i + 3) for i in range(4)] + [range(12 + 2 * i, 14 + 2 * i) for i in range(6)]
    starts = {image[0]: list(image) for image in images}
    position = 0
    for count, tokens in layout:
        for _ in range(count):
            kept = rows[position : position + tokens].tolist()
            assert kept == starts[kept[0]]
            position += tokens
    assert len(set(rows.tolist())) == len(rows) == position
    assert scale.flatten().tolist() == [2.0] * position


@pytest.mark.parametrize(
    ("images", "rate", "kept"), [(1, 0.9, 1), (10, 0.3, 7), (3, 0.3, 2), (32, 0.1, 28), (0, 0.3, 0)]
)
def test_the_number_of_kept_images_differs_from_dinov2(images: int, rate: float, kept: int) -> None:
    rows, scale, layout = draw_subset(((images, 2),), rate, CPU)
    assert layout == ((kept, 2),)
    assert rows.shape == (2 * kept,)
    assert torch.isfinite(scale).all()
    if kept:
        assert scale[0].item() == pytest.approx(images / kept)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_an_impossible_drop_rate_is_accepted(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path in \[0, 1\)"):
        make_block(drop_path=rate)


def test_training_under_autocast_fails() -> None:
    block = make_block(drop_path=0.5).train()
    x = torch.randn(4, 3, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_short_parameters_of_a_norm_are_refused_or_shorten_its_input() -> None:
    torch.manual_seed(0)
    norm, x = TokenNorm(WIDTH), torch.randn(5, WIDTH)
    nn.init.normal_(norm.weight)
    expected = nn.functional.layer_norm(x, (WIDTH,), norm.weight.bfloat16().float(), norm.bias, norm.eps)
    assert torch.equal(norm.bfloat16()(x), expected)
    assert torch.equal(TokenNorm(WIDTH)(x.bfloat16()), nn.LayerNorm(WIDTH)(x.bfloat16()))


def step_of(run: Callable[..., Tensor], block: Block, x: Tensor) -> tuple[Tensor, Counter[str]]:
    """Return the gradient of the first weights, and how often a step calls each operation.

    By a profiler: what is compiled does not run under a mode that counts.
    """
    block.zero_grad()
    torch.manual_seed(0)  # the same images are dropped
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(x, ((4, 5),)).square().sum().backward()
    gradient = block.attn.qkv.weight.grad
    assert gradient is not None
    return gradient.clone(), Counter({event.key: event.count for event in profiler.key_averages()})


@pytest.mark.slow
def test_a_compiled_block_keeps_other_results_than_it_is_told_or_draws_other_images_again() -> None:
    block, x = make_block(drop_path=0.5), torch.randn(20, WIDTH)
    gradients, calls = {}, {}
    for kept in ("all", "products", "inputs"):
        block.checkpointed, block.keep_products = kept != "all", kept == "products"
        # Decides what to keep as the real compiler does, and writes no code.
        compiled = torch.compile(block, dynamic=False, backend="aot_eager_decomp_partition")
        step_of(compiled, block, x)
        gradients[kept], calls[kept] = step_of(compiled, block, x)
    product, attention = "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls["all"][product] == calls["products"][product] < calls["inputs"][product]
    assert calls["all"][attention] < calls["products"][attention] == calls["inputs"][attention]
    assert all(torch.equal(gradient, gradients["all"]) for gradient in gradients.values())
    block.checkpointed = False
    torch.testing.assert_close(gradients["all"], step_of(block, block, x)[0])  # a norm is several operations there
