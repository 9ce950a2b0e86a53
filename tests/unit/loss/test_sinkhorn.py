from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinov2_equi.loss.sinkhorn import sinkhorn_knopp


def sinkhorn_by_loops(logits: Tensor, temperature: float, n_iterations: int) -> Tensor:
    """The definition in the docstring, in float64 and entry by entry."""
    num_rows, num_columns = logits.shape
    q = [[math.exp(value / temperature) for value in row] for row in logits.double().tolist()]
    for _ in range(n_iterations):
        for column in range(num_columns):
            total = sum(q[row][column] for row in range(num_rows))
            for row in range(num_rows):
                q[row][column] /= total
        for row in range(num_rows):
            total = sum(q[row])
            q[row] = [value / total for value in q[row]]
    return torch.tensor(q, dtype=torch.float64)


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (3, 9), (1, 5), (5, 1)])
def test_assignments_differ_from_plain_loops(rows: int, columns: int, n_iterations: int) -> None:
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    actual = sinkhorn_knopp(logits, 0.1, n_iterations)
    # Logits over the temperature are of order 30: their float32 rounding alone is 3e-6 of a probability.
    torch.testing.assert_close(actual.double(), sinkhorn_by_loops(logits, 0.1, n_iterations), rtol=2e-5, atol=1e-12)


def test_the_input_is_changed() -> None:
    logits = torch.randn(4, 3)
    before = logits.clone()
    sinkhorn_knopp(logits, 1.0)
    assert torch.equal(logits, before)


def test_no_row_is_an_error() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 7), 0.05).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_or_far_apart_logits_overflow(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1000.0, -1000.0, 0.0], [-3000.0, -3000.0, -2999.0], [0.0, 0.0, 0.0]], dtype=dtype)
    actual = sinkhorn_knopp(logits, 0.04)
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("rows", [1, 4])
def test_equal_rows_are_not_shared_evenly(rows: int) -> None:
    actual = sinkhorn_knopp(torch.randn(1, 5).expand(rows, 5), 0.05)
    # Every prototype gives each of the equal rows the same, so the first round ends in a uniform assignment.
    torch.testing.assert_close(actual, torch.full((rows, 5), 0.2))


def test_prototypes_are_not_used_equally_after_many_rounds() -> None:
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    # 100 rounds converge far below float32's accuracy at this temperature.
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.5, 100).sum(dim=0), torch.full((4,), 3.0), rtol=1e-4, atol=0)


def test_a_gradient_flows_to_the_teacher() -> None:
    assert not sinkhorn_knopp(torch.randn(3, 3, requires_grad=True), 1.0).requires_grad


@pytest.mark.parametrize(
    ("shape", "temperature", "n_iterations"), [((3,), 1.0, 3), ((1, 3, 3), 1.0, 3), ((3, 3), 0.0, 3), ((3, 3), 1.0, 0)]
)
def test_impossible_arguments_are_accepted(shape: tuple[int, ...], temperature: float, n_iterations: int) -> None:
    with pytest.raises(ValueError, match=r"logits \[R, K\], temperature > 0"):
        sinkhorn_knopp(torch.zeros(shape), temperature, n_iterations)
