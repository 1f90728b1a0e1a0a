"""The product of rows with a matrix is torch's own, forward and backward, whichever kernel computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trajdist.models.linear import FEWEST_ROWS, Linear, linear, use_fast_linear

# Too few, fewest, a prime, a square, trajectories of a batch, none at all.
SHAPES = [(5, 24), (FEWEST_ROWS, 24), (131, 24), (16, 16, 24), (3, 49, 8, 24), (0, 24)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(shape, has_bias):
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (10, 24), (10,)))
    answers = []
    for product in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
        out = product(*leaves) if has_bias else product(*leaves[:2])
        out.square().sum().backward()
        answers.append((out, *(leaf.grad for leaf in leaves if leaf.grad is not None)))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)


def test_rows_of_a_larger_matrix():
    """Not contiguous: every other column, transposed."""
    rows = torch.randn(40, 300).T[:, ::2]
    weight = torch.randn(20, 7).T
    torch.testing.assert_close(linear(rows, weight), rows @ weight.T, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_its_type():
    rows, layer = torch.randn(256, 24), Linear(24, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
    assert linear(rows.double(), layer.weight.double()).dtype == torch.float64


def test_it_is_a_linear_layer():
    torch.manual_seed(0)
    ours = Linear(24, 10)
    torch.manual_seed(0)
    plain = nn.Linear(24, 10)
    assert isinstance(ours, nn.Linear)
    assert torch.equal(ours.weight, plain.weight)
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_a_network_with_fast_layers_is_the_same_network():
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Sequential(Own(48, 10)), nn.Linear(10, 4, bias=False))
    rows, weights = torch.randn(4, 64, 24), {name: weight.clone() for name, weight in network.state_dict().items()}
    before = network(rows)
    use_fast_linear(network)
    assert [type(part) for part in network] == [Linear, nn.GELU, nn.Sequential, Linear]
    assert type(network[2][0]) is Own
    assert all(torch.equal(weights[name], weight) for name, weight in network.state_dict().items())
    torch.testing.assert_close(network(rows), before, rtol=1e-4, atol=1e-5)
