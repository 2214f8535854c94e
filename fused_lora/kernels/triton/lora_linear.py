"""lora_linear by Triton's kernels, with an epilogue behind its product, and with dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.full_grads import full_grads
from fused_lora.kernels.interface import ActivationGrad, Adapters, Epilogue, Grads, HiddenGrad
from fused_lora.kernels.triton import (
    lora_extended,
    lora_grad,
    lora_grad_rank,
    lora_one_pass,
    lora_shrink,
)
from fused_lora.kernels.triton.available import DTYPES
from fused_lora.kernels.triton.border import Packed, packed
from fused_lora.kernels.triton.launches import extended_grads, gelu_grads, tile_of
from fused_lora.kernels.triton.lora_extended import describable
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.philox import dropout
from fused_lora.kernels.triton.tiles import BulkTile
from fused_lora.types import Forward, Gradient, Keep, Needs, Plan, Span, ragged

# Grouped LoRA linear from this room's kernels, and library GEMMs where they are frozen-sized.
#
#     forward   EXTENDED  h = x aT; y = act(x wT + bias + s h bT) in one accumulator
#               ONE_PASS  the same, h formed from the tiles of x that the product reads
#               MERGE     w' = w + s b a in one pass over w; y = x w'T + bias by the library
#     dx        the same three, on dy, dh and a
#     gradients RANK  db = s dyT h, da = dhT x     FULL  from dw = dyT x, by the library
#
# The face and its meaning are those of ``fused_lora.kernels.aten.lora_linear``.


def forward(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    bordered: Tensor | None = None,  # [M, K + sum R] whose first K columns are x
    h: Tensor | None = None,  # [M, sum R] where it is there already, for EXTENDED
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and what ``plan.keep`` names: h [M, sum R], w' [N, K] or None."""
    if plan.forward is Forward.MERGE:
        new = merged(w, adapters)
        return F.linear(x, new, bias), new if plan.keep is Keep.MERGED else None
    low = packed(uniform(adapters), x.dtype, rows_kept(x, plan))
    x, bias = rows(x), None if bias is None else bias.contiguous()
    if plan.forward is Forward.ONE_PASS:
        tile = _product_tile("one_pass", x, w.shape[0], adapters)
        y, h, _ = lora_one_pass.forward(x, w, bias, low, tile=tile)
    else:
        tile = _product_tile("extended", x, w.shape[0], adapters)
        tail = None if bordered is None else bordered[:, x.shape[1] :]
        x, w = (readable(t, tile) for t in (x, w))
        h = shrink(x, low, tail) if h is None else readable(h, tile)
        y = lora_extended.forward(x, w, bias, low, h=h, tile=tile).y
    return y, h.contiguous() if plan.keep is Keep.HIDDEN else None


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w', or is not asked for
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    activation_grad: ActivationGrad | None = None,  # where dx goes on to du
    given: HiddenGrad | None = None,  # dh where it is there already
) -> Grads:
    """The gradients named by ``needs``."""
    dy, x, own = rows(dy), None if x is None else rows(x), uniform(adapters)
    thin = plan.gradient is Gradient.RANK or (needs.x and plan.dx is not Forward.MERGE)
    low = packed(own, dy.dtype) if thin else own
    dx, dh = None, None
    if needs.x:
        dx, dh = input_grad(dy, kept, w, own, plan, activation_grad, low, given)
    dh = given.dh if given else dh
    dw = None
    if needs.w:
        assert x is not None
        dw = dy.t() @ x
    if plan.gradient is Gradient.FULL:
        a, b = full_grads(dy, x, dw, adapters, adapters.to(dy.dtype), needs)
    else:
        h = kept if plan.keep is Keep.HIDDEN else None
        a = _a_grads(dy, dh, x, own, low, adapters) if needs.a else _none(adapters)
        b = _b_grads(dy, h, x, own, low, adapters) if needs.b else _none(adapters)
    return Grads(dx, dw, dy.sum(0) if needs.bias else None, a, b)


def input_grad(
    dy: Tensor,  # [M, N]
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w'
    adapters: Adapters,
    plan: Plan,
    activation_grad: ActivationGrad | None = None,  # of EXTENDED
    low: Adapters | Packed | None = None,  # the adapters in dy's dtype, where they are there
    given: HiddenGrad | None = None,  # dh where it is there already, likewise
) -> tuple[Tensor, Tensor | None]:
    """dx = dy w + dh a [M, K], or du in its place, and dh where it was formed on the way."""
    if plan.keep is Keep.MERGED:
        assert kept is not None
        return dy @ kept, None
    assert w is not None
    if plan.dx is Forward.MERGE:
        return dy @ merged(w, adapters), None
    dy, low = rows(dy), low or packed(uniform(adapters), dy.dtype)
    kernel = "extended_gelu" if activation_grad else plan.dx.value
    tile = _product_tile(kernel, dy, w.shape[1], adapters)
    if plan.dx is Forward.ONE_PASS:
        return lora_one_pass.input_grad(dy, w, low, tile=tile)
    dy, w = (readable(t, tile) for t in (dy, w))
    dh = given.dh if given else shrink_grad(dy, low)
    how: dict[str, Any] = {}
    if activation_grad:
        how = {"activation": activation_grad.activation, "u": activation_grad.u}
    return lora_extended.input_grad(dy, w, low, dh=dh, tile=tile, **how)


def input_grad_and_slices(
    dy: Tensor,  # [M, N]
    w: Tensor,  # [N, K]
    adapters: Adapters,
    dh: Tensor,  # [M, sum R]
    activation_grad: ActivationGrad,  # with a previous linear
) -> lora_grad.GradSlices:
    """du [M, K], and the sums that da and the previous linear's db are added up from."""
    activation, u, previous = activation_grad
    assert previous is not None
    h = previous.h
    dy, low = rows(dy), packed(uniform(adapters), dy.dtype)
    tile = _product_tile(extended_grads(activation), dy, w.shape[1], adapters)
    return lora_grad.input_grad_and_slices(dy, w, low, dh, activation, rows(u), rows(h), tile)


def activation_grad_and_slices(
    dg: Tensor,  # [M, K], dy w
    adapters: Adapters,
    dh: Tensor,  # [M, sum R]
    activation_grad: ActivationGrad,  # with a previous linear, whose dh is formed as well
) -> lora_grad.GradSlices:
    """Likewise, behind a product that is there."""
    activation, u, previous = activation_grad
    assert previous is not None
    tile = tile_of(gelu_grads(activation), *dg.shape, 0, dg.dtype, dg.device)
    before = uniform(previous.adapters)
    given = (dg, uniform(adapters), dh, activation, rows(u), rows(previous.h), before)
    made = lora_grad.activation_grad_and_slices(*given, tile)
    assert made.hidden is not None
    lora_grad.add_blocks(made.hidden, before, dg.dtype, previous.dh)
    return made


def rows(t: Tensor) -> Tensor:
    """``t``, copied unless its rows are contiguous; of a single column, torch calls any so."""
    return t if t.stride(1) == 1 else t.clone(memory_format=torch.contiguous_format)


def rows_kept(x: Tensor, plan: Plan) -> int:
    """Of an h as large as what a forward may keep beside what ``plan`` names."""
    return x.shape[0] if plan.keep is Keep.NOTHING else 0


def readable(t: Tensor, tile: object) -> Tensor:
    """``t``, copied where ``tile`` reads by descriptors and none can be made of it."""
    if not isinstance(tile, BulkTile) or describable(t) or t.numel() == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def uniform(adapters: Adapters) -> Adapters:
    """The same adapters, in fp32 unless every a is of one dtype the kernels read, and every b."""
    for halves in (adapters.a, adapters.b):
        dtype = halves[0].dtype
        if dtype not in DTYPES or any(half.dtype is not dtype for half in halves):
            return adapters.to(torch.float32)
    return adapters


def shrink(x: Tensor, adapters: Adapters | Packed, out: Tensor | None = None) -> Tensor:
    """h = x aT, [M, sum R]."""
    tile = _tile("shrink", x, adapters.rank, x.shape[1])
    return lora_shrink.shrink(x, adapters, out, tile=tile)


def shrink_grad(dy: Tensor, adapters: Adapters | Packed) -> Tensor:
    """dh = s dy b, [M, sum R]."""
    tile = _tile("shrink", dy, adapters.rank, dy.shape[1])
    return lora_shrink.shrink_grad(dy, adapters, tile=tile)


def _product_tile(kernel: str, x: Tensor, columns: int, adapters: Adapters | Packed):
    rows, depth = x.shape
    return tile_of(kernel, rows, columns, depth, x.dtype, x.device, ragged(adapters.spans))


def _tile(kernel: str, x: Tensor, columns: int, depth: int):
    return tile_of(kernel, x.shape[0], columns, depth, x.dtype, x.device)


def merged(w: Tensor, adapters: Adapters, noise: tuple[int, int] | None = None) -> Tensor:
    """w' [N, K], rounded to nearest, or stochastically by ``noise``, a seed and a step."""
    n, k = w.shape
    tile = tile_of("merge", n, k, adapters.rank, w.dtype, w.device)
    return lora_merge(rows(w), *uniform(adapters), noise, tile=tile)


def _a_grads(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor | None,
    own: Adapters,
    low: Adapters | Packed,
    asked: Adapters,
) -> list[Tensor | None]:
    """da = dhT x, each in its own dtype."""
    assert x is not None
    dh = shrink_grad(dy, low) if dh is None else dh
    tile = tile_of("grad", own.rank, x.shape[1], x.shape[0], x.dtype, x.device)
    grads = lora_grad_rank.a_grads(dh, x, own, tile=tile)
    return [grad.to(a.dtype) for grad, a in zip(grads, asked.a, strict=True)]


def _b_grads(
    dy: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    own: Adapters,
    low: Adapters | Packed,
    asked: Adapters,
) -> list[Tensor | None]:
    """db = s dyT h, each in its own dtype."""
    if h is None:
        assert x is not None
        h = shrink(x, low)
    tile = tile_of("grad", own.rank, dy.shape[1], dy.shape[0], dy.dtype, dy.device)
    grads = lora_grad_rank.b_grads(h, dy, own, tile=tile)
    return [grad.to(b.dtype) for grad, b in zip(grads, asked.b, strict=True)]


def _none(adapters: Adapters) -> list[Tensor | None]:
    return [None] * len(adapters.spans)


def forward_epilogue(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    epilogue: Epilogue,  # without an activation where the forward is ONE_PASS
    out: Tensor | None = None,  # [M, N] for y, rows contiguous
    h: Tensor | None = None,  # [M, sum R] where it is there already, for EXTENDED
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], h [M, sum R] where the plan keeps it, and u [M, N] where the epilogue stores it."""
    active, factor, residual, stores_u = epilogue
    low = packed(uniform(adapters), x.dtype, rows_kept(x, plan))
    x, bias = rows(x), None if bias is None else bias.contiguous()
    n, k = w.shape
    kernel, uneven = epilogue.kernel(plan.forward.value, x.dtype), ragged(adapters.spans)
    tile = tile_of(kernel, x.shape[0], n, k, x.dtype, x.device, uneven)
    dtype = x.dtype
    for t in (factor, residual):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    if out is None:
        out = x.new_empty((x.shape[0], n), dtype=dtype)
    joined: dict[str, Any] = {"factor": factor, "residual": residual, "out": out}
    if plan.forward is Forward.ONE_PASS:
        assert active == "none", active
        y, h, u = lora_one_pass.forward(x, w, bias, low, tile, **joined)
    else:
        x, w = (readable(t, tile) for t in (x, w))
        h = shrink(x, low) if h is None else readable(h, tile)
        stores_u = stores_u or x.element_size() > 2  # without it fp32 spills in some tiles
        given = (x, w, bias, low, active, h, tile)
        y, _, u = lora_extended.forward(*given, **joined, stores_u=stores_u)
    return y, h.contiguous() if plan.keep is Keep.HIDDEN else None, u


# The dropped branch of an adapter, its mask formed by every kernel that needs it.
#
#     h = (D x) aT      dx = D (dh a)      da = dhT (D x)      D of reference/dropout.py
#
#                 x, dx [M, K]   a, da [R, K]   h, dh [M, R]
#
# dx is the extended GEMM over no columns of y at all. The face is that of
# ``fused_lora.kernels.aten.lora_linear_cases``.

STEP = 0  # a seed is drawn for every call


def dropout_shrink(x: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """h [M, R] in x's dtype."""
    tile = _tile("shrink_dropout", x, a.shape[0], x.shape[1])
    return lora_shrink.shrink(x, _alone(a), tile=tile, dropout=dropout(p, seed, STEP))


def dropout_grads(
    dh: Tensor,  # [M, R]
    x: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,
    p: float,
    seed: int | Tensor,
    needs_x: bool,
    dx: Tensor | None = None,  # [M, K], what D (dh a) is added to, in place
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] in dh's dtype and da [R, K] in a's, where asked for."""
    if needs_x:
        through = dropout_input_grad(dh, a, p, seed)
        dx = through if dx is None else dx.add_(through)
    return dx, None if x is None else dropout_a_grad(dh, x, a, p, seed)


def dropout_input_grad(dh: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """dx [M, K] in dh's dtype."""
    columns = a.shape[1]
    tile = _tile("extended_dropout", dh, columns, 0)
    dy, w, mask = dh[:, :0], dh.new_empty((0, columns)), dropout(p, seed, STEP)
    return lora_extended.input_grad(dy, w, _alone(a), dh, tile, dropout=mask)[0]


def dropout_a_grad(dh: Tensor, x: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """da [R, K] in a's dtype."""
    sizes = a.shape[0], x.shape[1], x.shape[0]
    tile = tile_of("grad_dropout", *sizes, x.dtype, x.device)
    mask = dropout(p, seed, STEP)
    return lora_grad_rank.a_grads(dh, x, _alone(a), tile=tile, dropout=mask)[0].to(a.dtype)


def _alone(a: Tensor) -> Adapters:
    """One adapter of which only a matters."""
    a = a if a.dtype in DTYPES else a.to(torch.float32)
    return Adapters([a], [a.new_empty((0, a.shape[0]))], (1.0,), (Span(0, 0, a.shape[0]),))
