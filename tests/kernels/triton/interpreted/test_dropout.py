"""Dropout: the reference's mask in every kernel that regenerates it, and gradients that match."""

import pytest
import torch

from fused_lora.kernels.triton import lora_extended, lora_grad_rank, lora_shrink
from fused_lora.kernels.triton.philox import dropout
from fused_lora.reference import dropout as reference
from fused_lora.reference import lora_linear
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Needs, Span
from tests.kernels.triton.cases import (
    DTYPES,
    GRAD_TILE,
    THIN_TILE,
    TILE,
    Case,
    adapters,
    build,
    lowered,
)
from tests.kernels.triton.parity import flat

P, SEED, STEP = 0.3, 2**63 + 5, 2**40 + 1
CASES = [
    Case("rows that eights do not divide", 37, 43, 29, (Span(0, 29, 5),)),
    Case("qkv", 70, 48, 96, tuple(Span(32 * g, 32 * g + 32, 4) for g in range(3))),
]
CASE = pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])


def reference_run(p):
    """h, y, dx, da with D x in the adapters' branch and x in the base's."""
    dropped = reference.dropout(p.x, P, SEED, STEP)
    none = torch.zeros_like(p.w)
    operands = (p.a, p.b, p.scales, p.spans)
    grads = lora_linear.backward(p.dy, dropped, none, *operands, Needs())
    branch = lora_linear.forward(dropped, none, None, *operands)
    base = p.x @ p.w.T if p.bias is None else p.x @ p.w.T + p.bias
    yield "h", dropped @ torch.cat(p.a).T
    yield "y", base + branch
    yield "dx", p.dy @ p.w + reference.dropout(grads.x, P, SEED, STEP)
    yield "da", flat(grads.a)


def triton_run(p):
    group, mask = adapters(p), dropout(P, SEED, STEP)
    y, h, _ = lora_extended.forward(p.x, p.w, p.bias, group, tile=TILE, dropout=mask)
    dx, dh = lora_extended.input_grad(p.dy, p.w, group, tile=TILE, dropout=mask)
    yield "h", h
    yield "y", y
    yield "dx", dx
    yield "da", flat(lora_grad_rank.a_grads(dh, p.x, group, tile=GRAD_TILE, dropout=mask))


@CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(case, dtype):
    p = build(case, dtype, torch.float32)
    plain = in_every_order(lambda: dict(reference_run(lowered(p, dtype))))
    verdict = judge_all(dict(triton_run(p)), plain, dict(reference_run(p.double())), dtype)
    assert verdict.passed, str(verdict)


def test_the_mask_itself():
    """a = 1 in one rank and x = 1: h counts what is kept of each row."""
    x, eye = torch.ones(197, 43), torch.eye(43)
    group = adapters(build(CASES[0], torch.float32, torch.float32))._replace(
        a=[eye], spans=(Span(0, 29, 43),)
    )
    h = lora_shrink.shrink(x, group, tile=THIN_TILE, dropout=dropout(P, SEED, STEP))
    keep = reference.keep(197, 43, P, SEED, STEP, h.device)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(
        h[keep], torch.full((int(keep.sum()),), 1 / (1 - P)), rtol=1e-4, atol=0
    )
    assert abs(float(keep.double().mean()) - (1 - P)) < 0.02


def test_no_dropout_is_none():
    assert dropout(0.0, 1, 2) is None
