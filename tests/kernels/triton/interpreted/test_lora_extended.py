"""EXTENDED beyond parity: epilogues, operands where they lie."""

import pytest
import torch

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_extended
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import in_every_order, judge
from fused_lora.types import Needs
from tests.kernels.triton.cases import CASES, DTYPES, TILE, adapters, build, lowered

QKV = CASES[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_gelu_and_its_input(kind, approximate, dtype):
    p = build(QKV, dtype, torch.float32)
    plain = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    ours = lora_extended.forward(p.x, p.w, p.bias, adapters(p), kind, tile=TILE)
    assert plain.u is None and torch.equal(ours.u, plain.y)

    def expected(q):
        u = reference.forward(q.x, q.w, q.bias, q.a, q.b, q.scales, q.spans)
        return torch.nn.functional.gelu(u, approximate=approximate)

    theirs = in_every_order(lambda: expected(lowered(p, dtype)))
    verdict = judge(kind, ours.y, theirs, expected(p.double()), dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "erf"])
def test_layer_scale_and_residual(activation, dtype):
    p = build(QKV, dtype, torch.float32)
    factor, residual = torch.randn(QKV.n, dtype=dtype), torch.randn(QKV.m, QKV.n + 3, dtype=dtype)
    residual = residual[:, :-3]

    def epilogue(u):
        v = u if activation == "none" else torch.nn.functional.gelu(u)
        return residual.to(u.dtype) + factor.to(u.dtype) * v

    ours = lora_extended.forward(
        p.x, p.w, p.bias, adapters(p), activation, tile=TILE, factor=factor, residual=residual
    ).y

    def expected(q):
        return epilogue(reference.forward(q.x, q.w, q.bias, q.a, q.b, q.scales, q.spans))

    plain, truth = in_every_order(lambda: expected(lowered(p, dtype))), expected(p.double())
    verdict = judge("LayerScale and residual", ours, plain, truth, dtype)
    assert verdict.passed, str(verdict)


def activation_grad(u, approximate):
    """Of GELU, by autograd."""
    u = u.detach().requires_grad_()
    y = torch.nn.functional.gelu(u, approximate=approximate)
    return torch.autograd.grad(y.sum(), u)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_the_input_gradient_goes_on_through_gelu(kind, approximate, dtype):
    p = build(QKV, dtype, torch.float32)
    u = 3 * torch.randn(QKV.m, QKV.k, dtype=dtype)
    ours, dh = lora_extended.input_grad(p.dy, p.w, adapters(p), tile=TILE, activation=kind, u=u)

    def expected(q):
        needs = Needs(a=False, b=False)
        dx = reference.backward(q.dy, q.x, q.w, q.a, q.b, q.scales, q.spans, needs).x
        return dx * activation_grad(u.to(dx.dtype), approximate)

    plain = in_every_order(lambda: expected(lowered(p, dtype)))
    verdict = judge(kind, ours, plain, expected(p.double()), dtype)
    assert verdict.passed, str(verdict)
    assert lora_extended.input_grad(p.dy, p.w, adapters(p), dh, TILE)[1] is dh


def test_outputs_go_into_the_left_of_a_bordered_buffer():
    p = build(QKV, torch.bfloat16, torch.float32)
    y = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE).y
    dx, _ = lora_extended.input_grad(p.dy, p.w, adapters(p), tile=TILE)
    for product, run in (
        (y, lambda o: lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE, out=o)),
        (dx, lambda o: lora_extended.input_grad(p.dy, p.w, adapters(p), tile=TILE, out=o)),
    ):
        buffer = torch.full((product.shape[0], product.shape[1] + 8), 7.0, dtype=product.dtype)
        left = buffer[:, :-8]
        assert run(left)[0] is left and torch.equal(left, product)
        assert (buffer[:, -8:] == 7).all()


def test_an_x_and_an_h_inside_one_bordered_buffer_are_read_where_they_are():
    p = build(QKV, torch.bfloat16, torch.float32)
    y, h, _ = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    buffer = torch.full((p.x.shape[0], p.x.shape[1] + h.shape[1]), torch.nan, dtype=h.dtype)
    x, tail = buffer[:, : p.x.shape[1]], buffer[:, p.x.shape[1] :]
    x.copy_(p.x)
    tail.copy_(h)
    again = lora_extended.forward(x, p.w, p.bias, adapters(p), h=tail, tile=TILE)
    assert torch.equal(again.y, y) and again.h is tail


def test_a_transposed_w_gives_the_same_bits():
    p = build(QKV, torch.float32, torch.float32)
    once = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE).y
    again = lora_extended.forward(p.x, p.w.t().contiguous().t(), p.bias, adapters(p), tile=TILE).y
    assert torch.equal(once, again)


def test_columns_outside_every_span_see_the_base_alone():
    case = CASES[4]
    p = build(case, torch.float32, torch.float32)
    y = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE).y
    empty = Adapters([torch.zeros_like(t) for t in p.a], p.b, p.scales, p.spans)
    base = lora_extended.forward(p.x, p.w, p.bias, empty, tile=TILE).y
    assert torch.equal(y[:, 41:90], base[:, 41:90])
    assert torch.equal(y[:, :3], base[:, :3])


def test_tf32_is_used_where_torch_allows_it():
    p = build(CASES[0], torch.float32, torch.float32)
    exact = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE).y
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        rough = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=TILE).y
    finally:
        setting.fp32_precision = before
    difference = float((rough - exact).norm() / exact.norm())
    assert 1e-5 < difference < 2e-3
