"""Grouped LoRA linear from library GEMMs.

    forward   SEPARATE  y = addmm(bias, x, wT); y[:, g] += s_g h_g b_gT in place   (y rounds twice)
              BORDERED  y = [x | h] [w | s b]T + bias                              (y rounds once)
              MERGE     y = x w'T + bias, w' = w + s b a                           (w' rounds)
    dx        the same three, on [dy | dh] and [w ; a]
    gradients RANK  db = s dyT h, da = dhT x     FULL  dw = dyT x, db = s dw aT, da = s bT dw

BORDERED copies x and w unless x already lies in a bordered buffer: it pays where y is wider than x,
or where the second rounding of SEPARATE costs the adapter's signal; in fp32 on a CPU it never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.aten.gemm import outer, product, thin_rows
from fused_lora.kernels.aten.lora_merge import lora_merge
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.types import Forward, Gradient, Keep, Needs, Plan


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    bordered: Tensor | None = None,  # [M, K + sum R] whose first K columns are x
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and what ``plan.keep`` names: h [M, sum R], w' [N, K] or None."""
    if plan.forward is Forward.MERGE:
        merged = lora_merge(w, *adapters)
        return _linear(x, merged, bias), merged if plan.keep is Keep.MERGED else None
    adapters = adapters.to(x.dtype)
    if plan.forward is Forward.SEPARATE:
        h = x @ adapters.stacked_a().t()
        y = _linear(x, w, bias)
        for g, cols, ranks in adapters.ranks():
            y[:, cols].addmm_(h[:, ranks], adapters.b[g].t(), alpha=adapters.scales[g])
    else:
        k = x.shape[1]
        if bordered is None:
            bordered = x.new_empty(x.shape[0], k + adapters.rank)
            bordered[:, :k].copy_(x)
        h = bordered[:, k:]
        torch.mm(x, adapters.stacked_a().t(), out=h)
        y = _linear(bordered, bordered_weight(w, adapters), bias)
        h = h.contiguous() if plan.keep is Keep.HIDDEN else h
    return y, h if plan.keep is Keep.HIDDEN else None


def bordered_weight(w: Tensor, adapters: Adapters) -> Tensor:
    """[w | s b], [N, K + sum R]; a column range sees its own adapter only."""
    wide = w.new_zeros(w.shape[0], w.shape[1] + adapters.rank)
    wide[:, : w.shape[1]].copy_(w)
    border = wide[:, w.shape[1] :]
    for g, cols, ranks in adapters.ranks():
        torch.mul(adapters.b[g], adapters.scales[g], out=border[cols, ranks])
    return wide


def backward(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what forward kept
    w: Tensor,  # [N, K]
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
) -> Grads:
    """The gradients named by ``needs``."""
    low = adapters.to(dy.dtype)
    rank = plan.gradient is Gradient.RANK
    dh = None
    border = None
    if (needs.x and plan.dx is not Forward.MERGE) or (rank and needs.a):
        bordered = needs.x and plan.dx is Forward.BORDERED
        border = dy.new_empty(dy.shape[0], dy.shape[1] + low.rank) if bordered else None
        dh = _hidden_grad(dy, low, None if border is None else border[:, dy.shape[1] :])
    dx = _dx(dy, dh, border, kept, w, adapters, low, plan) if needs.x else None
    a, b, dw = _adapter_grads(dy, x, kept, dh, adapters, low, needs, plan)
    return Grads(dx, dw, dy.sum(0) if needs.bias else None, a, b)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())


def _hidden_grad(dy: Tensor, low: Adapters, out: Tensor | None) -> Tensor:
    dh = dy.new_empty(dy.shape[0], low.rank) if out is None else out
    for g, cols, ranks in low.ranks():
        dh[:, ranks].addmm_(dy[:, cols], thin_rows(low.b[g]), beta=0, alpha=low.scales[g])
    return dh


def _dx(
    dy: Tensor,
    dh: Tensor | None,
    border: Tensor | None,
    kept: Tensor | None,
    w: Tensor,
    adapters: Adapters,
    low: Adapters,
    plan: Plan,
) -> Tensor:
    if plan.dx is Forward.MERGE:
        merged = kept if plan.keep is Keep.MERGED else None
        return dy @ (lora_merge(w, *adapters) if merged is None else merged)
    if border is not None:
        border[:, : dy.shape[1]].copy_(dy)
        return border @ torch.cat((w, *low.a))
    assert dh is not None
    return (dy @ w).addmm_(dh, low.stacked_a())


def _adapter_grads(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    dh: Tensor | None,
    adapters: Adapters,
    low: Adapters,
    needs: Needs,
    plan: Plan,
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    a: list[Tensor | None] = [None] * len(low.spans)
    b: list[Tensor | None] = [None] * len(low.spans)
    dw = dy.t() @ x if needs.w else None
    if plan.gradient is Gradient.RANK:
        h = kept if plan.keep is Keep.HIDDEN else x @ low.stacked_a().t() if needs.b else None
        for g, cols, ranks in low.ranks():
            if needs.b:
                b[g] = outer(dy[:, cols], h[:, ranks], low.scales[g], adapters.b[g].dtype)
        if needs.a:
            da = product(dh.t(), x, 1.0, adapters.a[0].dtype)  # [sum R, K]
            a = [da[ranks] for _, _, ranks in low.ranks()]
    elif plan.gradient is Gradient.FULL:
        for g, cols, _ in low.ranks():
            dw_g = dy[:, cols].t() @ x if dw is None else dw[cols]
            if needs.b:
                b[g] = product(dw_g, low.a[g].t(), low.scales[g], adapters.b[g].dtype)
            if needs.a:
                a[g] = product(low.b[g].t(), dw_g, low.scales[g], adapters.a[g].dtype)
    return a, b, dw
