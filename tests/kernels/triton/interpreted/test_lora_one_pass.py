"""ONE_PASS beyond parity: h is the shrink's, operands where they lie, infinities."""

import torch

from fused_lora.kernels.triton import lora_one_pass, lora_shrink
from tests.kernels.triton.cases import CASES, THIN_TILE, TILE, adapters, build

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
