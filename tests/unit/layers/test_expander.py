from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2_equi.layers.expander import Expander


def test_expander_is_not_linear_norm_relu_and_a_last_linear_layer() -> None:
    torch.manual_seed(0)
    expander = Expander(5, dim=7, num_layers=3)
    x = torch.randn(4, 5)
    hidden = x
    for index in (0, 3):
        hidden = hidden @ expander[index].weight.T
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        hidden = hidden.relu()
    # rounding of the batch norm
    torch.testing.assert_close(expander(x), hidden @ expander[6].weight.T, rtol=1e-4, atol=1e-5)


def test_expander_of_one_layer_is_not_linear() -> None:
    expander = Expander(5, dim=7, num_layers=1)
    assert [type(layer) for layer in expander] == [nn.Linear]


def test_expander_holds_running_statistics_that_nothing_uses() -> None:
    assert not list(Expander(5, dim=7).buffers())


def test_expander_without_layers_is_built() -> None:
    with pytest.raises(ValueError, match="expected num_layers >= 1, got 0"):
        Expander(5, num_layers=0)
