from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dinov2_equi.layers import backend
from dinov2_equi.layers.packing import TokenLayout

CPU = torch.device("cpu")
LAYOUT: TokenLayout = ((2, 3), (1, 4))


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backend.BACKEND_VARIABLE, raising=False)
    backend._chosen.clear()
    yield
    backend._chosen.clear()


def random_qkv(heads: int = 2, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(images * tokens for images, tokens in LAYOUT)
    query, key, value = torch.randn(3, rows, heads, head_dim, generator=generator)
    return query, key, value


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    out = torch.empty_like(value)
    start = 0
    for images, tokens in layout:
        for _ in range(images):
            for head in range(query.shape[1]):
                for row in range(start, start + tokens):
                    keys = key[start : start + tokens, head]
                    weights = (keys @ query[row, head] / query.shape[2] ** 0.5).softmax(0)
                    out[row, head] = weights @ value[start : start + tokens, head]
            start += tokens
    return out


def test_sdpa_differs_from_plain_loops_or_mixes_images() -> None:
    query, key, value = random_qkv()
    # float32 softmax and sums of 8 terms of order 1.
    torch.testing.assert_close(
        backend.attend_sdpa(query, key, value, LAYOUT),
        attention_by_loops(query, key, value, LAYOUT),
        atol=1e-6,
        rtol=0,
    )


def test_a_cpu_does_not_use_sdpa() -> None:
    chosen = backend.attention_backend(CPU)
    assert chosen.name == "sdpa"
    assert chosen.attend is backend.attend_sdpa


def test_a_cpu_imports_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_import_xformers", lambda: pytest.fail("xFormers was imported"))
    backend.attention_backend(CPU)
    assert "xformers" not in sys.modules


def test_the_description_lacks_name_or_reason() -> None:
    line = backend.describe_backend(CPU)
    assert "cpu" in line
    assert "sdpa" in line
    assert "CUDA" in line
    assert "\n" not in line


def test_a_forced_backend_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.attention_backend(CPU)
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "sdpa")
    assert "forced" in backend.describe_backend(CPU)


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_forcing_a_cuda_backend_on_a_cpu_passes_silently(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(backend.BACKEND_VARIABLE, name)
    with pytest.raises(RuntimeError, match=f"{name} cannot be used on cpu.*CUDA"):
        backend.attention_backend(CPU)


def test_a_misspelt_backend_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "flash")
    with pytest.raises(ValueError, match=r"sdpa, xformers, varlen, got 'flash'"):
        backend.attention_backend(CPU)


def test_a_candidate_that_agrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_load_varlen", lambda: attention_by_loops_with_gradient)
    attend, problem = backend._try_candidate("varlen", CPU)
    assert attend is attention_by_loops_with_gradient
    assert problem == ""


def attention_by_loops_with_gradient(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    scores = torch.einsum("rhd,shd->hrs", query, key) / query.shape[2] ** 0.5
    image = torch.cat([torch.full((t,), 100 * g + i) for g, (n, t) in enumerate(layout) for i in range(n)])
    scores = scores.masked_fill(image[:, None] != image[None, :], -torch.inf)
    return torch.einsum("hrs,shd->rhd", scores.softmax(-1), value)


def without_scale(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    return backend.attend_sdpa(query * 3, key, value, layout)


def without_gradient(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    return backend.attend_sdpa(query.detach(), key, value, layout)


def not_a_number(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    return backend.attend_sdpa(query, key, value, layout) * torch.nan


def no_kernel(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    raise NotImplementedError("no kernel for this device\nlong details")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (without_scale, "differs from sdpa"),
        (without_gradient, "differs from sdpa"),
        (not_a_number, "differs from sdpa"),
        (no_kernel, "NotImplementedError no kernel for this device"),
    ],
)
def test_a_broken_candidate_is_used(monkeypatch: pytest.MonkeyPatch, broken: object, problem: str) -> None:
    monkeypatch.setattr(backend, "_load_xformers", lambda: broken)
    attend, reason = backend._try_candidate("xformers", CPU)
    assert attend is None
    assert problem in reason
    assert "long details" not in reason


def test_a_missing_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    attend, reason = backend._try_candidate("xformers", CPU)
    assert attend is None
    assert reason == "ImportError not installed"


def test_the_choice_changes_the_random_numbers_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_load_varlen", lambda: attention_by_loops_with_gradient)
    before = torch.get_rng_state()
    backend._try_candidate("varlen", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_sequence_starts_are_wrong() -> None:
    starts = backend._sequence_starts(LAYOUT, CPU)
    assert starts.tolist() == [0, 3, 6, 10]
    assert starts.dtype == torch.int32


def test_sequence_starts_made_in_inference_mode_break_a_later_backward_pass() -> None:
    backend._sequence_starts.cache_clear()
    with torch.inference_mode():
        starts = backend._sequence_starts(((3, 2), (2, 1)), CPU)
    assert not starts.is_inference()


@pytest.mark.parametrize(
    ("layout", "dtype", "head_dim", "expected"),
    [
        (LAYOUT, torch.bfloat16, 64, False),
        (((2, 5),), torch.bfloat16, 64, True),  # one crop size
        (LAYOUT, torch.float32, 64, True),  # a dtype the kernels lack
        (LAYOUT, torch.bfloat16, 12, True),  # a head the kernels lack
        (LAYOUT, torch.bfloat16, 512, True),
    ],
)
def test_kernels_get_what_they_cannot_compute(
    layout: TokenLayout, dtype: torch.dtype, head_dim: int, expected: bool
) -> None:
    query = torch.empty(1, 2, head_dim, dtype=dtype)
    assert backend._prefers_sdpa(query, layout, backend._HALF_DTYPES) is expected


def attention_of_sequences(query: Tensor, key: Tensor, value: Tensor, starts: list[int]) -> Tensor:
    layout = tuple((1, stop - start) for start, stop in itertools.pairwise(starts))
    return backend.attend_sdpa(query, key, value, layout)


def fake_varlen_attn(*args: object) -> Tensor:
    """Take what torch's `varlen_attn` takes, and check it."""
    query, key, value, starts_q, starts_k, longest_q, longest_k = args
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    assert isinstance(starts_q, Tensor)
    assert starts_k is starts_q
    assert longest_q == longest_k == int(starts_q.diff().max())
    return attention_of_sequences(query, key, value, starts_q.tolist())


class FakeBlockDiagonalMask:
    """Like xFormers' mask, as far as it is used."""

    def __init__(self, lengths: list[int]) -> None:
        self.starts = [sum(lengths[:count]) for count in range(len(lengths) + 1)]

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> FakeBlockDiagonalMask:
        return cls(lengths)


def fake_memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: FakeBlockDiagonalMask
) -> Tensor:
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1
    return attention_of_sequences(query[0], key[0], value[0], attn_bias.starts).unsqueeze(0)


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_a_packing_kernel_is_called_wrongly(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ops = SimpleNamespace(memory_efficient_attention=fake_memory_efficient_attention)
    masks = SimpleNamespace(BlockDiagonalMask=FakeBlockDiagonalMask)
    monkeypatch.setattr(backend, "_import_xformers", lambda: (ops, masks))
    monkeypatch.setattr(
        backend.importlib, "import_module", lambda module: SimpleNamespace(varlen_attn=fake_varlen_attn)
    )
    attend, problem = backend._try_candidate(name, CPU)
    assert problem == ""
    assert attend is not None
    query, key, value = (tensor.to(torch.bfloat16) for tensor in random_qkv())
    expected = backend.attend_sdpa(query, key, value, LAYOUT)
    # One call for each image or for each crop size: the same numbers up to bfloat16's rounding.
    torch.testing.assert_close(attend(query, key, value, LAYOUT), expected, atol=2e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_a_cuda_backend_differs_from_sdpa(name: str) -> None:
    device = torch.device("cuda")
    attend, problem = backend._try_candidate(name, device)
    if attend is None:
        pytest.skip(f"{name} is not usable here: {problem}")
    layout: TokenLayout = ((4, 197), (6, 50))
    qkv = torch.randn(3, 4 * 197 + 6 * 50, 6, 64, device=device, dtype=torch.bfloat16)
    # bfloat16 keeps 8 bits; the outputs are means of values of order 1.
    torch.testing.assert_close(attend(*qkv, layout), backend.attend_sdpa(*qkv, layout), atol=2e-2, rtol=0)
