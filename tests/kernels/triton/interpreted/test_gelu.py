"""GELU and its gradient as kernels of their own: the yardstick, far tails, bordered buffers."""

import pytest
import torch
from torch.nn.functional import gelu as torch_gelu

from fused_lora.kernels.triton import elementwise
from fused_lora.testing.yardstick import judge
from tests.kernels.triton.cases import DTYPES
from tests.kernels.triton.guards import fenced

KINDS = pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])


def input_grad(dy, u, approximate):
    """By autograd."""
    u = u.detach().requires_grad_()
    return torch.autograd.grad(torch_gelu(u, approximate=approximate), u, dy)[0]


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n", [(197, 71), (3, 1030), (1, 1), (0, 8)])
def test_parity(m, n, dtype, kind, approximate, monkeypatch):
    u, dy = 3 * torch.randn(m, n, dtype=dtype), torch.randn(m, n, dtype=dtype)
    with fenced(monkeypatch):
        y, du = elementwise.gelu_forward(u, kind), elementwise.gelu_input_grad(dy, u, kind)
    truth = torch_gelu(u.double(), approximate=approximate)
    truth_du = input_grad(dy.double(), u.double(), approximate)
    for verdict in (
        judge("y", y, torch_gelu(u, approximate=approximate), truth, dtype),
        judge("du", du, input_grad(dy, u, approximate), truth_du, dtype),
    ):
        assert verdict.passed, str(verdict)


@KINDS
def test_the_tails_are_zero_and_one(kind, approximate):
    u = torch.tensor([[-1e4, -40.0, -0.0, 40.0, 1e4]])
    ones = torch.ones_like(u)
    assert elementwise.gelu_forward(u, kind).tolist() == [[0.0, 0.0, 0.0, 40.0, 1e4]]
    assert elementwise.gelu_input_grad(ones, u, kind).tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@KINDS
def test_beyond_all_sizes_it_is_u_or_nothing(kind, approximate):
    """A number times nothing, where it might be infinity times nothing."""
    u = torch.tensor([[-torch.inf, -1e30, 1e30, torch.inf, torch.nan]])
    y = elementwise.gelu_forward(u, kind)
    assert y[0, :4].tolist() == [0.0, 0.0, float(u[0, 2]), torch.inf] and y[0, 4].isnan()


def test_the_left_of_a_bordered_buffer():
    u, dy = torch.randn(37, 48), torch.randn(37, 48)
    for expected, run in (
        (elementwise.gelu_forward(u), lambda out: elementwise.gelu_forward(u, out=out)),
        (
            elementwise.gelu_input_grad(dy, u),
            lambda out: elementwise.gelu_input_grad(dy, u, out=out),
        ),
    ):
        buffer = torch.full((37, 48 + 16), 7.0)
        left = buffer[:, :48]
        assert run(left) is left and torch.equal(left, expected)
        assert (buffer[:, 48:] == 7).all()
