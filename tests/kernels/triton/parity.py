"""Every kernel of one problem against float64, by the yardstick rule, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_lora.kernels.triton import lora_extended, lora_grad_rank, lora_one_pass, lora_shrink
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Needs
from tests.kernels.triton.cases import GRAD_TILE, THIN_TILE, TILE, adapters, lowered
from tests.ops.problems import Problem

Named = Iterator[tuple[str, Tensor]]


def flat(tensors: list[Tensor]) -> Tensor:
    """A group's gradients as one vector: apart, one element would be judged by one rounding."""
    return torch.cat([t.flatten() for t in tensors])


def reference_run(p: Problem) -> Named:
    """What the equations make of p, in p's dtype."""
    yield "h", p.x @ torch.cat(p.a).T
    spans = zip(p.scales, p.spans, p.b, strict=True)
    yield "dh", torch.cat([s * p.dy[:, c.start : c.stop] @ b for s, c, b in spans], 1)
    yield "y", reference.forward(p.x, p.w, p.bias, p.a, p.b, p.scales, p.spans)
    grads = reference.backward(p.dy, p.x, p.w, p.a, p.b, p.scales, p.spans, Needs())
    yield "dx", grads.x
    yield "da", flat(grads.a)
    yield "db", flat(grads.b)


def one_pass_run(p: Problem, small: bool = True) -> Named:
    """h, dh, y and dx by ONE_PASS; nothing where the ranks are too many for it."""
    if sum(span.rank for span in p.spans) > lora_one_pass.MOST_RANKS:
        return
    gemm = TILE if small else None
    y, h, _ = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile=gemm)
    dx, dh = lora_one_pass.input_grad(p.dy, p.w, adapters(p), tile=gemm)
    yield from (("h", h), ("dh", dh), ("y", y), ("dx", dx))


def triton_run(p: Problem, small: bool = True) -> Named:
    """What the kernels make of it; in ``small`` tiles or in those that ship."""
    thin, gemm, grad = (THIN_TILE, TILE, GRAD_TILE) if small else (None, None, None)
    group = adapters(p)
    h = lora_shrink.shrink(p.x, group, tile=thin)
    dh = lora_shrink.shrink_grad(p.dy, group, tile=thin)
    yield "h", h
    yield "dh", dh
    yield "y", lora_extended.forward(p.x, p.w, p.bias, group, h=h, tile=gemm).y
    yield "dx", lora_extended.input_grad(p.dy, p.w, group, dh=dh, tile=gemm)[0]
    yield "da", flat(lora_grad_rank.a_grads(dh, p.x, group, tile=grad))
    yield "db", flat(lora_grad_rank.b_grads(h, p.dy, group, tile=grad))


def check(p: Problem, dtype: torch.dtype, small: bool = True) -> None:
    """Raise AssertionError where a kernel leaves the yardstick."""
    plain = in_every_order(lambda: dict(reference_run(lowered(p, dtype))))
    truth = dict(reference_run(p.double()))
    for run in (triton_run, one_pass_run):
        ours = dict(run(p, small))
        assert all(t.isfinite().all() for t in ours.values()), run.__name__
        if ours:
            verdict = judge_all(ours, plain, truth, dtype)
            assert verdict.passed, f"{run.__name__}: {verdict}"
