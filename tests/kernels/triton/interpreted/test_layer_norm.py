"""LayerNorm: the yardstick, every row written, left columns of a bordered buffer."""

import pytest
import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from fused_lora.kernels.triton import elementwise
from fused_lora.testing.yardstick import judge
from tests.kernels.triton.cases import DTYPES
from tests.kernels.triton.guards import fenced

SHAPES = [(197, 71), (5, 384), (1, 1), (33, 1025), (0, 16)]  # odd, whole, least, long, empty
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-6


def operands(m, d, dtype):
    x, dy, residual = ((3 * torch.randn(m, d) + 1).to(dtype) for _ in range(3))
    return x, dy, residual, torch.randn(d), torch.randn(d)


def input_grad(dy, x, weight, bias):
    """By autograd."""
    x = x.detach().requires_grad_()
    y = torch_layer_norm(x, x.shape[1:], weight, bias, EPS)
    return torch.autograd.grad(y, x, dy)[0]


@DTYPE
@pytest.mark.parametrize("m, d", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_parity(m, d, affine, dtype, monkeypatch):
    x, dy, residual, weight, bias = operands(m, d, dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    low, high = ([None if t is None else t.to(to) for t in (weight, bias)]
                 for to in (dtype, torch.float64))  # fmt: skip
    with fenced(monkeypatch):
        y, mean, rstd = elementwise.layer_norm_forward(x, weight, bias, EPS)
        dx = elementwise.layer_norm_input_grad(dy, x, weight, mean, rstd, residual)
    plain = torch_layer_norm(x, (d,), *low, EPS)
    truth = torch_layer_norm(x.double(), (d,), *high, EPS)
    plain_dx = input_grad(dy, x, *low) + residual
    truth_dx = input_grad(dy.double(), x.double(), *high) + residual.double()
    for verdict in (judge("y", y, plain, truth, dtype), judge("dx", dx, plain_dx, truth_dx, dtype)):
        assert verdict.passed, str(verdict)


def test_a_mean_far_from_zero_is_no_loss():
    """Two passes over registers: the variance is not a difference of large sums."""
    x = torch.randn(7, 300) + 1000
    _, _, rstd = elementwise.layer_norm_forward(x, None, None, EPS)
    truth = (x.double().var(1, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), truth, rtol=1e-5, atol=0)


@DTYPE
def test_rebuilt_bits_in_a_bordered_buffer(dtype):
    x, dy, _, weight, bias = operands(37, 48, dtype)
    y, mean, rstd = elementwise.layer_norm_forward(x, weight, bias, EPS)
    dx = elementwise.layer_norm_input_grad(dy, x, weight, mean, rstd)
    runs = {
        "forward": (y, lambda out: elementwise.layer_norm_forward(x, weight, bias, EPS, out).y),
        "rebuild": (
            y,
            lambda out: elementwise.layer_norm_rebuild(x, weight, bias, mean, rstd, out),
        ),
        "dx": (
            dx,
            lambda out: elementwise.layer_norm_input_grad(dy, x, weight, mean, rstd, out=out),
        ),
    }
    for name, (expected, run) in runs.items():
        buffer = torch.full((37, 48 + 16), 7.0, dtype=dtype)
        left = buffer[:, :48]
        assert run(left) is left and torch.equal(left, expected), name
        assert (buffer[:, 48:] == 7).all(), name
