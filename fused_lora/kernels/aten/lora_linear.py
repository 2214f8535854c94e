"""lora_linear and lora_merge by the library's GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.full_grads import full_grads
from fused_lora.kernels.gemm import (
    accumulate,
    batched_product,
    columns,
    dense,
    outer,
    product,
    thin_rows,
)
from fused_lora.kernels.interface import Adapters, Grads, HiddenGrad
from fused_lora.reference.philox import stochastic_round
from fused_lora.types import Forward, Gradient, Keep, Needs, Plan, Span, even


def lora_merge(
    w: Tensor,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K], any strides, any float dtype
    b: Sequence[Tensor],  # G of [N_g, R_g], any strides, any float dtype
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
    noise: tuple[int, int] | None = None,  # (seed, step) of stochastic rounding
) -> Tensor:
    """w' [N, K], a new tensor in w's dtype, rounded to nearest unless ``noise`` is given."""
    wide = torch.promote_types(w.dtype, torch.float32)
    if w.dtype is wide and spans[0].width == w.shape[0]:  # one pass over w instead of two
        return torch.addmm(w, b[0].to(wide), a[0].to(wide), alpha=scales[0])
    merged = w.to(wide, copy=True)
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        accumulate(merged[span.start : span.stop], b_g.to(wide), a_g.to(wide), s_g)
    return merged.to(w.dtype) if noise is None else stochastic_round(merged, w.dtype, *noise)


# Grouped LoRA linear from library GEMMs.
#
#     forward   SEPARATE  y = addmm(bias, x, wT); y[:, g] += s_g h_g b_gT in place  (y rounds twice)
#               BORDERED  y = [x | h] [w | s b]T + bias                              (y rounds once)
#               MERGE     y = x w'T + bias, w' = w + s b a                           (w' rounds)
#               OPEN      z = addmm(bias, x, wT); s_g h_g b_gT is left to whoever reads z
#     dx        the same four, on [dy | dh] and [w ; a]
#     gradients RANK  db = s dyT h, da = dhT x     FULL  dw = dyT x, db = s dw aT, da = s bT dw
#
# BORDERED copies x unless it already lies in a bordered buffer, and w unless it is given a copy
# beside s b or a: it pays where y is wider than x, or where the second rounding of SEPARATE costs
# the adapter's signal; in fp32 on a CPU it never does.


FEW = 64  # stacked ranks that are copied sooner than another product is launched


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    bordered: Tensor | None = None,  # [M, K + sum R] whose first K columns are x
    h: Tensor | None = None,  # [M, sum R] where it is there already: the others of ``bordered``
    wide: Tensor | None = None,  # [N, K + sum R]: [w | s b] where that is there already
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and what ``plan.keep`` names: h [M, sum R], w' [N, K] or None."""
    if plan.forward is Forward.MERGE:
        merged = lora_merge(w, *adapters)
        return F.linear(x, merged, bias), merged if plan.keep is Keep.MERGED else None
    adapters = adapters.to(x.dtype)
    if plan.forward in (Forward.SEPARATE, Forward.OPEN):
        y, h = open_forward(x, w, bias, adapters, h)
        y = y if plan.forward is Forward.OPEN else expand(y, h, adapters)
    else:
        k, there = x.shape[1], bordered is not None and h is not None
        if bordered is None:
            bordered = x.new_empty(x.shape[0], k + adapters.rank)
            bordered[:, :k].copy_(x)
        border = bordered[:, k:]
        if h is None:
            h = shrink(x, adapters, out=border)
        elif not there:
            h = border.copy_(h)
        y = F.linear(bordered, bordered_weight(w, adapters) if wide is None else wide, bias)
        h = h.contiguous() if plan.keep is Keep.HIDDEN else h
    return y, h if plan.keep is Keep.HIDDEN else None


def open_forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    h: Tensor | None = None,  # [M, sum R] where it is there already
) -> tuple[Tensor, Tensor]:
    """z [M, N] and h [M, sum R], of y = z + s h bT."""
    h = shrink(x, adapters.to(x.dtype)) if h is None else h
    return F.linear(x, w, bias), h


def shrink(x: Tensor, adapters: Adapters, out: Tensor | None = None) -> Tensor:
    """h = x aT, [M, sum R]: over the stacked a, or group by group where stacking costs more."""
    if out is None and stacks(x, adapters):
        return F.linear(dense(x), dense(adapters.stacked_a()))
    h = x.new_empty(x.shape[0], adapters.rank) if out is None else out
    if stacks(x, adapters):
        return accumulate(h, x, adapters.stacked_a().t(), 1.0, beta=0)
    for g, _, ranks in adapters.ranks():
        accumulate(h[:, ranks], x, adapters.a[g].t(), 1.0, beta=0)
    return h


def expand(y: Tensor, h: Tensor, adapters: Adapters) -> Tensor:
    """y += s h bT in place, each adapter on its columns; of even ones one batched product."""
    if batched(y, adapters):
        y_g, h_g, b = apart(y, adapters), apart(h, adapters), stacked_b(adapters)
        y_g.baddbmm_(h_g, b.transpose(1, 2), alpha=adapters.scales[0])
        return y
    for g, cols, ranks in adapters.ranks():
        b, scale = adapters.b[g].t(), adapters.scales[g]
        accumulate(columns(y, cols), columns(h, ranks), b, scale)
    return y


def batched(y: Tensor, adapters: Adapters, reduces: bool = False) -> bool:
    """Whether the products of all adapters with their columns of y or dy are one of a batch.

    ``reduces``: they sum over M or over columns, of which a CPU's batches of 16 bits are slow.
    """
    if len(set(adapters.scales)) > 1 or not even(adapters.spans, y.shape[1]):
        return False
    return not (reduces and y.is_cpu and y.element_size() == 2 and y.shape[0] >= FEW)


def apart(t: Tensor, adapters: Adapters) -> Tensor:
    """[G, M, C] of t [M, G C]: each adapter's columns."""
    groups = len(adapters.spans)
    return t.view(t.shape[0], groups, t.shape[1] // groups).transpose(0, 1)


def stacked_b(adapters: Adapters) -> Tensor:
    """[G, N / G, R] of G b."""
    return torch.cat(tuple(adapters.b)).view(len(adapters.b), *adapters.b[0].shape)


def shrink_grad(dy: Tensor, adapters: Adapters, out: Tensor | None = None) -> Tensor:
    """dh = s dy b, [M, sum R]."""
    if out is None and len(adapters.b) == 1 and adapters.scales[0] == 1.0:
        columns_of = adapters.spans[0]
        part = columns(dy, slice(columns_of.start, columns_of.stop))
        return torch.mm(dense(part), dense(thin_rows(adapters.b[0], dy.shape[0])))
    dh = dy.new_empty(dy.shape[0], adapters.rank) if out is None else out
    if batched(dy, adapters, reduces=True):
        given = apart(dy, adapters), stacked_b(adapters)
        apart(dh, adapters).baddbmm_(*given, beta=0, alpha=adapters.scales[0])
        return dh
    for g, cols, ranks in adapters.ranks():
        b = thin_rows(adapters.b[g], dy.shape[0])
        accumulate(columns(dh, ranks), columns(dy, cols), b, adapters.scales[g], beta=0)
    return dh


def stacks(x: Tensor, adapters: Adapters) -> bool:
    """Whether copying all a together costs less than passing over x once per group."""
    return len(adapters.a) == 1 or adapters.rank < max(x.shape[0], FEW)


def bordered_weight(w: Tensor, adapters: Adapters) -> Tensor:
    """[w | s b], [N, K + sum R]; a column range sees its own adapter only."""
    wide = w.new_empty(w.shape[0], w.shape[1] + adapters.rank)
    wide[:, : w.shape[1]].copy_(w)
    border = wide[:, w.shape[1] :]
    if any(span.width < w.shape[0] for span in adapters.spans):
        border.zero_()
    for g, cols, ranks in adapters.ranks():
        torch.mul(adapters.b[g], adapters.scales[g], out=border[cols, ranks])
    return wide


def backward(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w', or is not asked for
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    given: HiddenGrad | None = None,  # dh where it is there already
    wide: Tensor | None = None,  # [N + sum R, K]: [w ; a] where that is there already
) -> Grads:
    """The gradients named by ``needs``."""
    g = _Backward(dy, x, kept, w, adapters, adapters.to(dy.dtype), needs, plan, given, wide)
    dx = g.dx() if needs.x else None
    dw = dy.t() @ g.x if needs.w else None
    if plan.gradient is Gradient.FULL:
        a, b = full_grads(dy, x, dw, adapters, g.low, needs)
    else:
        a, b = g.rank_grads()
    dh = g.dh if needs.x and plan.dx is Forward.OPEN else None
    return Grads(dx, dw, dy.sum(0) if needs.bias else None, a, b, dh)


def input_grad(
    dy: Tensor,  # [M, N], rows contiguous
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w'
    adapters: Adapters,
    plan: Plan,
    given: HiddenGrad | None = None,  # dh where it is there already
    wide: Tensor | None = None,  # [N + sum R, K]: [w ; a] where that is there already
) -> tuple[Tensor, Tensor | None]:
    """dx [M, K], and dh [M, sum R], rows contiguous, where it was formed on the way.

    By OPEN dx is dy w alone.
    """
    low = adapters.to(dy.dtype)
    g = _Backward(dy, None, kept, w, adapters, low, Needs(), plan, given, wide)
    return g.dx(), None if plan.dx is Forward.MERGE else g.dh


def place_of_dh(dy: Tensor, rank: int, plan: Plan, dh: Tensor | None = None) -> HiddenGrad:
    """Where dh is to be written for ``input_grad``, beside a copy of dy or alone.

    It is uninitialised, unless ``dh`` [M, sum R] is given, which is copied where it has to be.
    """
    m, n = dy.shape
    if plan.dx is not Forward.BORDERED:
        return HiddenGrad(dy.new_empty(m, rank) if dh is None else dh)
    bordered = dy.new_empty(m, n + rank)
    bordered[:, :n].copy_(dy)
    if dh is not None:
        bordered[:, n:].copy_(dh)
    return HiddenGrad(bordered[:, n:], bordered)


class _Backward:
    """One backward pass: its operands, and dh once it is formed."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor | None,
        kept: Tensor | None,
        w: Tensor | None,
        adapters: Adapters,
        low: Adapters,  # the adapters in the compute dtype
        needs: Needs,
        plan: Plan,
        given: HiddenGrad | None = None,
        wide: Tensor | None = None,
    ) -> None:
        self.given, self.wide = given, wide
        self.dy, self._x, self.kept, self._w = dy, x, kept, w
        self.adapters, self.low, self.needs, self.plan = adapters, low, needs, plan

    @property
    def x(self) -> Tensor:
        assert self._x is not None
        return self._x

    @property
    def w(self) -> Tensor:
        assert self._w is not None
        return self._w

    @cached_property
    def dh(self) -> Tensor:
        """s dy b, [M, sum R]; the right end of [dy | dh] where dx wants that."""
        if self.given:
            return self.given.dh
        if self.needs.x and self.plan.dx is Forward.BORDERED:
            return self.bordered[:, self.dy.shape[1] :]
        return shrink_grad(self.dy, self.low)

    @cached_property
    def bordered(self) -> Tensor:
        """[dy | dh], [M, N + sum R]."""
        made = self.given
        if made is None:
            made = place_of_dh(self.dy, self.low.rank, self.plan)
            shrink_grad(self.dy, self.low, made.dh)
        assert made.bordered is not None
        return made.bordered

    def dx(self) -> Tensor:
        """dy w + dh a, [M, K]; by OPEN dy w."""
        if self.plan.dx is Forward.BORDERED:
            made = torch.cat((self.w, *self.low.a)) if self.wide is None else self.wide
            return self.bordered @ made
        if self.plan.dx is Forward.OPEN:
            return self.dy @ self.w
        if self.plan.dx is Forward.SEPARATE:
            return expand_grad(self.dy @ self.w, self.dh, self.low)
        if self.plan.keep is Keep.MERGED:
            assert self.kept is not None
            return self.dy @ self.kept
        return self.dy @ lora_merge(self.w, *self.adapters)

    def rank_grads(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """da = dhT x, db = s dyT h; None throughout where no adapter trains."""
        h = self.kept if self.plan.keep is Keep.HIDDEN else None
        dh = self.dh if self.needs.a else None
        return rank_grads(self.dy, self._x, h, dh, self.adapters, self.low, self.needs)


def expand_grad(dx: Tensor, dh: Tensor, adapters: Adapters) -> Tensor:
    """dx += dh a in place."""
    if stacks(dx, adapters):
        return accumulate(dx, dh, adapters.stacked_a(), 1.0)
    for g, _, ranks in adapters.ranks():
        accumulate(dx, dh[:, ranks], adapters.a[g], 1.0)
    return dx


def rank_grads(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    h: Tensor | None,  # [M, sum R]; formed where needed and not given
    dh: Tensor | None,  # [M, sum R], likewise
    adapters: Adapters,
    low: Adapters,  # the same in dy's dtype
    needs: Needs,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """da and db of every adapter, each in its own dtype."""
    a: list[Tensor | None] = [None] * len(low.spans)
    b: list[Tensor | None] = [None] * len(low.spans)
    if needs.b:
        h = _thin_of(x, low) if h is None else h
        b = b_grads(dy, h, adapters, low)
    if needs.a:
        assert x is not None
        dh = shrink_grad(dy, low) if dh is None else dh
        da = product(dh.t(), x, 1.0, adapters.widest_a())  # [sum R, K]
        a = [da[ranks].to(adapters.a[g].dtype) for g, _, ranks in low.ranks()]
    return a, b


def b_grads(dy: Tensor, h: Tensor, adapters: Adapters, low: Adapters) -> list[Tensor | None]:
    """db = s dyT h of every adapter, each in its own dtype; of even ones one batched product."""
    dtypes = {b_g.dtype for b_g in adapters.b}
    if len(dtypes) == 1 and batched(dy, low, reduces=True):
        given = apart(dy, low).transpose(1, 2), apart(h, low)
        return list(batched_product(*given, low.scales[0], *dtypes).unbind(0))
    return [
        outer(columns(dy, cols), columns(h, ranks), low.scales[g], adapters.b[g].dtype)
        for g, cols, ranks in low.ranks()
    ]


def _thin_of(x: Tensor | None, low: Adapters) -> Tensor:
    assert x is not None
    return shrink(x, low)
