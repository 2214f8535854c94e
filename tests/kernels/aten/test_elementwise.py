"""LayerNorm and GELU by the library behind the faces of the Triton kernels."""

import pytest
import torch
from torch.nn import functional as F

from fused_lora.kernels.aten import elementwise
from fused_lora.testing.yardstick import judge

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(197, 71), (1, 1), (0, 16)]  # odd, least, empty
EPS = 1e-6
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("m, d", SHAPES)


def wide_view(t):
    """The same numbers in the left of a wider tensor."""
    return F.pad(t, (0, 5))[:, : t.shape[1]]


def by_autograd(function, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, dy)[0]


def passed(name, ours, plain, truth, dtype):
    verdict = judge(name, ours, plain, truth, dtype)
    assert verdict.passed, str(verdict)


class TestLayerNorm:
    @each_dtype
    @each_shape
    @pytest.mark.parametrize("affine", ["neither", "weight", "bias", "both"])
    @pytest.mark.parametrize("strided", [False, True])
    def test_within_the_yardstick(self, m, d, affine, strided, dtype):
        x, dy, residual = ((3 * torch.randn(m, d) + 1).to(dtype) for _ in range(3))
        lay = wide_view if strided else lambda t: t
        weight = torch.randn(d) if affine in ("weight", "both") else None
        bias = torch.randn(d) if affine in ("bias", "both") else None
        y, mean, rstd = elementwise.layer_norm_forward(lay(x), weight, bias, EPS)
        again = elementwise.layer_norm_rebuild(lay(x), weight, bias, mean, rstd)
        dx = elementwise.layer_norm_input_grad(lay(dy), lay(x), weight, mean, rstd, lay(residual))
        assert {y.dtype, again.dtype, dx.dtype} == {dtype} and mean.shape == rstd.shape == (m,)

        def plain(dtype):
            low = [None if t is None else t.to(dtype) for t in (weight, bias)]
            return lambda x: F.layer_norm(x, (d,), *low, EPS)

        truth, theirs = plain(torch.float64)(x.double()), plain(dtype)(x)
        passed("y", y, theirs, truth, dtype)
        passed("rebuilt y", again, theirs, truth, dtype)
        truth = by_autograd(plain(torch.float64), x.double(), dy.double()) + residual.double()
        passed("dx", dx, by_autograd(plain(dtype), x, dy) + residual, truth, dtype)

    @pytest.mark.parametrize("needs", [(1, 1, 1), (0, 1, 0), (1, 0, 0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_subset_of_gradients(self, needs, dtype):
        x, dy = torch.randn(9, 12), torch.randn(9, 12).to(dtype)
        given = [t.requires_grad_() for t in (x, torch.randn(12), torch.randn(12))]
        y = F.layer_norm(given[0], (12,), *given[1:], EPS)
        truth = torch.autograd.grad(y, given, dy.float())
        x, weight, bias = (t.detach() for t in given)
        _, mean, rstd = elementwise.layer_norm_forward(x, weight, bias, EPS)
        found = elementwise.layer_norm_grads(
            dy, x, weight, bias, mean, rstd, [n > 0 for n in needs]
        )
        assert [grad is not None for grad in found] == [n > 0 for n in needs]
        for grad, expected in zip(found, truth, strict=True):
            if grad is not None:
                torch.testing.assert_close(grad, expected)

    def test_a_wide_x_and_a_narrow_out(self):
        x = torch.randn(7, 12)
        buffer = torch.full((7, 17), 7.0, dtype=torch.bfloat16)
        y, mean, rstd = elementwise.layer_norm_forward(x, None, None, EPS, buffer[:, :12])
        assert torch.equal(y, F.layer_norm(x, (12,), eps=EPS).bfloat16())
        assert mean.dtype is torch.float32 and y.data_ptr() == buffer.data_ptr()
        elementwise.layer_norm_rebuild(x, None, None, mean, rstd, buffer[:, :12])
        torch.testing.assert_close(y.float(), F.layer_norm(x, (12,)), rtol=0.01, atol=0.01)
        elementwise.layer_norm_input_grad(x, x, None, mean, rstd, out=buffer[:, :12])
        expected = elementwise.layer_norm_input_grad(x, x, None, mean, rstd)
        assert torch.equal(y, expected.bfloat16()) and (buffer[:, 12:] == 7).all()


class TestGelu:
    @each_dtype
    @each_shape
    @pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
    @pytest.mark.parametrize("bordered", [False, True])
    def test_within_the_yardstick(self, m, d, kind, approximate, bordered, dtype):
        """A bordered buffer has every column of its left written, and none of its right."""
        u, dy = (3 * torch.randn(2, m, d)).to(dtype)
        buffers = torch.full((2, m, d + 5), torch.nan, dtype=dtype)
        outs = [buffer[:, :d] if bordered else None for buffer in buffers]
        y, du = (
            elementwise.gelu_forward(u, kind, outs[0]),
            elementwise.gelu_input_grad(dy, u, kind, outs[1]),
        )
        if bordered:
            assert [y.data_ptr(), du.data_ptr()] == [out.data_ptr() for out in outs]
        assert buffers[:, :, d:].isnan().all()
        plain = lambda u: F.gelu(u, approximate=approximate)  # noqa: E731
        passed("y", y, plain(u), plain(u.double()), dtype)
        truth = by_autograd(plain, u.double(), dy.double())
        passed("du", du, by_autograd(plain, u, dy), truth, dtype)

    def test_who_writes_where_it_is_told(self):
        u, on_gpu = torch.randn(2, 3), torch.empty(2, 3, device="meta")
        assert (
            not elementwise.gelu_places(u)
            and elementwise.gelu_places(u, "tanh")
            and elementwise.gelu_places(on_gpu)
        )
