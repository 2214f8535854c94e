"""LayerNorm and GELU by who may serve: here the library, and by name nobody else."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fused_lora.kernels.interface import Epilogue
from fused_lora.ops import elementwise
from fused_lora.ops.epilogues import why_not_activation_grad, why_not_fused
from fused_lora.ops.lora_linear import NO_GRADIENT, Frame, compute
from fused_lora.types import Backend, Forward, Gradient, Impl, Keep, Plan, Span

norm = elementwise.layer_norm_forward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_is_torchs(dtype):
    x, gamma = torch.randn(5, 24, dtype=dtype), torch.randn(24)
    gamma = gamma.to(dtype) if dtype is torch.float64 else gamma
    bordered = torch.zeros(5, 32, dtype=dtype)
    y, mean, rstd = elementwise.layer_norm_forward(x, gamma, gamma, 1e-6, bordered[:, :24])
    assert y.data_ptr() == bordered.data_ptr() and not bordered[:, 24:].any()
    leaf = x.clone().requires_grad_()
    expected = F.layer_norm(leaf, (24,), gamma.to(dtype), gamma.to(dtype), 1e-6)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(y, expected.detach(), **tolerance)
    torch.testing.assert_close(
        elementwise.layer_norm_rebuild(x, gamma, gamma, mean, rstd), y, **tolerance
    )
    (dx,) = torch.autograd.grad(expected, leaf, x)
    ours = elementwise.layer_norm_input_grad(x, x, gamma, mean, rstd)
    torch.testing.assert_close(ours, dx, **tolerance)
    first, *_ = elementwise.layer_norm_grads(x, x, gamma, gamma, mean, rstd, (True, True, True))
    torch.testing.assert_close(first, dx, **tolerance)


@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_gelu_is_torchs(kind, approximate):
    u, out = torch.randn(5, 24), torch.zeros(5, 32)[:, :24]
    torch.testing.assert_close(
        elementwise.gelu_forward(u, kind, out), F.gelu(u, approximate=approximate)
    )
    du = torch.ops.aten.gelu_backward(u, u, approximate=approximate)
    assert torch.equal(elementwise.gelu_input_grad(u, u, kind), du)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: norm(x, None, None, 1e-6, impl=Impl.TRITON), ""),
        (lambda x: norm(x.t(), None, None, 1e-6, impl=Impl.TRITON), "strides|rows"),
        (lambda x: norm(x, x[0, ::2], None, 0.0, impl=Impl.TRITON), "no weight"),
        (lambda x: elementwise.gelu_forward(x.double(), impl=Impl.TRITON), "float64"),
        (lambda x: elementwise.gelu_input_grad(x, x, impl=Impl.TRITON), ""),
        (lambda x: norm(x.new_ones(1, 20000), None, None, 0, impl=Impl.TRITON),
         "20000 columns"),
    ],
)  # fmt: skip
def test_triton_says_why_it_cannot_serve(call, why):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot serve: .*({why})"):
        call(torch.randn(6, 8))


@pytest.mark.parametrize("activation", ["none", "erf", "tanh"])
def test_an_ending_is_what_it_says(activation):
    x, w, residual = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(10, 6)
    a, b, factor = torch.randn(3, 8), torch.randn(6, 3), torch.randn(6)
    frame = Frame((2.0,), (Span(0, 6, 3),), Impl.AUTO)
    given = (frame, x.dtype, (a, b), NO_GRADIENT)
    done = compute(x, w, None, *given, epilogue=Epilogue(activation, factor, residual))
    u = compute(x, w, None, *given).y.view(10, 6)
    act = {"none": lambda u: u, "erf": F.gelu, "tanh": lambda u: F.gelu(u, approximate="tanh")}
    expected = (residual + factor * act[activation](u)).view(2, 5, 6)
    torch.testing.assert_close(done.y, expected)
    assert done.u is None if activation == "none" else torch.equal(done.u, u)


def test_no_epilogue_where_the_library_has_the_plan():
    plan = Plan(Forward.SEPARATE, Forward.SEPARATE, Gradient.NONE, Keep.NOTHING)
    x = torch.randn(4, 4)
    for epilogue in (Epilogue("erf"), Epilogue(residual=x)):
        assert "the plan is separate/" in why_not_fused(x, x, (), plan, epilogue, x.dtype)
    one = replace(plan, forward=Forward.ONE_PASS, backend=Backend.TRITON)
    said = why_not_fused(x, x, (), one, Epilogue("erf"), x.dtype)
    assert "GELU is behind triton:extended" in said and "triton:one_pass/" in said
    assert "the plan is separate/" in why_not_activation_grad(x, x, (), plan, x.dtype)
