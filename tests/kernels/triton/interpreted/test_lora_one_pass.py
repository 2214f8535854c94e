"""ONE_PASS beyond parity: h is the shrink's, epilogues, operands where they lie, infinities."""

import pytest
import torch

from fused_lora.kernels.triton import lora_one_pass, lora_shrink
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import in_every_order, judge
from fused_lora.types import Needs
from tests.kernels.triton.cases import CASES, DTYPES, THIN_TILE, TILE, adapters, build, lowered

QKV = CASES[3]


def test_the_hidden_state_is_the_shrinks():
    p = build(QKV, torch.float32, torch.float32)
    _, h, _ = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    torch.testing.assert_close(h, lora_shrink.shrink(p.x, adapters(p), tile=THIN_TILE))


def test_strided_operands_give_the_same_bits():
    p = build(QKV, torch.bfloat16, torch.float32)
    once = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    wide = torch.full((p.x.shape[0], p.x.shape[1] + 5), torch.nan, dtype=p.x.dtype)
    x = wide[:, : p.x.shape[1]].copy_(p.x)
    again = lora_one_pass.forward(x, p.w.t().contiguous().t(), p.bias, adapters(p), tile=TILE)
    assert torch.equal(once.y, again.y) and torch.equal(once.h, again.h)


def test_ranks_of_padding_make_no_nan_of_an_infinity():
    p = build(CASES[1], torch.float32, torch.float32)
    for operand in (p.x, p.w, p.bias, *p.a, *p.b):
        operand.abs_()
    plain, _, _ = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    p.x[5, 7] = torch.inf
    y, h, _ = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile=TILE)
    others = torch.arange(p.x.shape[0]) != 5
    assert torch.equal(y[others], plain[others])
    assert (y[5] == torch.inf).all() and (h[5] == torch.inf).all()


def beside(rows, columns, dtype):
    """A factor, and a residual whose rows lie apart."""
    return torch.randn(columns, dtype=dtype), torch.randn(rows, columns + 3, dtype=dtype)[:, :-3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_layer_scale_and_residual(scaled, dtype):
    p = build(QKV, dtype, torch.float32)
    factor, residual = beside(QKV.m, QKV.n, dtype)
    factor = factor if scaled else None
    left = torch.full((QKV.m, QKV.n + 5), torch.nan, dtype=dtype)[:, : QKV.n]
    how = {"factor": factor, "residual": residual}
    ours = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), TILE, **how, out=left)
    alone = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), TILE)
    assert ours.y.data_ptr() == left.data_ptr() and torch.equal(ours.h, alone.h)

    def expected(q):
        y = reference.forward(q.x, q.w, q.bias, q.a, q.b, q.scales, q.spans)
        return residual.to(y.dtype) + (y if factor is None else factor.to(y.dtype) * y)

    plain, truth = in_every_order(lambda: expected(lowered(p, dtype))), expected(p.double())
    verdict = judge("LayerScale and residual", ours.y, plain, truth, dtype)
    assert verdict.passed, str(verdict)


def test_a_wider_residual_rounds_y_in_its_own_dtype():
    p = build(QKV, torch.bfloat16, torch.float32)
    _, residual = beside(QKV.m, QKV.n, torch.float32)
    y, out = torch.empty(2, QKV.m, QKV.n)
    for wide, joined in ((y, torch.zeros_like(residual)), (out, residual)):
        how = {"residual": joined, "out": wide}
        lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), TILE, **how)
    assert torch.equal(out, y + residual) and not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_joins_dx(dtype):
    p = build(QKV, dtype, torch.float32)
    _, residual = beside(QKV.m, QKV.k, dtype)
    ours, dh = lora_one_pass.input_grad(p.dy, p.w, adapters(p), TILE, residual=residual)
    assert torch.equal(dh, lora_one_pass.input_grad(p.dy, p.w, adapters(p), TILE)[1])

    def expected(q):
        needs = Needs(a=False, b=False)
        dx = reference.backward(q.dy, q.x, q.w, q.a, q.b, q.scales, q.spans, needs).x
        return residual.to(dx.dtype) + dx

    plain, truth = in_every_order(lambda: expected(lowered(p, dtype))), expected(p.double())
    verdict = judge("dx and what joins it", ours, plain, truth, dtype)
    assert verdict.passed, str(verdict)


def test_an_epilogue_of_another_shape_is_refused():
    p = build(QKV, torch.bfloat16, torch.float32)
    wrong = [{"residual": p.dy[:-1]}, {"factor": p.w[0]}, {"out": p.dy[:, :-1].clone()}]
    for how in wrong:
        with pytest.raises(AssertionError):
            lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), TILE, **how)
