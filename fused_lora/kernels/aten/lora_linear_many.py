"""Several adapted matrices on one x, from library GEMMs: one h, one accumulation of dx.

    h = x [a_1; a_2; ..]T       dh_i = s_i dy_i b_i       dx = sum_i dy_i w_i + dh [a_1; a_2; ..]
    [da_1; da_2; ..] = dhT x    db_i = s_i dy_iT h_i      dw_i = dy_iT x

The forward of each matrix, given its columns of h, is that of its own plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.gemm import accumulate, columns, outer, product, thin_rows
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.types import Needs


class Layer(NamedTuple):
    """One matrix in a backward pass."""

    dy: Tensor  # [M, N_i], rows contiguous
    w: Tensor | None  # [N_i, K]; None where dx is not asked for
    adapters: Adapters
    needs: Needs


def together(adapters: Sequence[Adapters]) -> Adapters:
    """All of them as one, for what reads a and the ranks; the spans stay each one's own."""
    return Adapters(
        [a for each in adapters for a in each.a],
        [b for each in adapters for b in each.b],
        [scale for each in adapters for scale in each.scales],
        [span for each in adapters for span in each.spans],
    )


def shrink_many(x: Tensor, adapters: Sequence[Adapters]) -> Tensor:
    """h [M, sum R] of x [M, K] and adapters in x's dtype."""
    return aten.shrink(x, together(adapters))


def backward_many(
    layers: Sequence[Layer],
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    h: Sequence[Tensor] | None,  # [M, R_i] of each layer; None to form it of x
) -> tuple[Tensor | None, list[Grads]]:
    """dx [M, K] where it is asked for, and each layer's own gradients."""
    lows = [layer.adapters.to(layer.dy.dtype) for layer in layers]
    low, ranks = together(lows), [layer.adapters.rank for layer in layers]
    dx, da = None, [None] * len(layers)
    if any(layer.needs.x or layer.needs.a for layer in layers):
        dh = _shrink_grad([layer.dy for layer in layers], lows)
        dx = _input_grad(layers, dh, low) if layers[0].needs.x else None
    if any(layer.needs.a for layer in layers):
        assert x is not None
        widest = together([layer.adapters for layer in layers]).widest_a()
        da = product(dh.t(), x, 1.0, widest).split(ranks)  # of [sum R, K]
    if h is None and any(layer.needs.b for layer in layers):
        assert x is not None
        h = aten.shrink(x, low).split(ranks, dim=1)
    hidden = [None] * len(layers) if h is None else h
    return dx, [_own_grads(*each, x) for each in zip(layers, da, hidden, strict=True)]


def _shrink_grad(dys: Sequence[Tensor], lows: Sequence[Adapters]) -> Tensor:
    """dh [M, sum R]."""
    ranks = [low.rank for low in lows]
    dh = dys[0].new_empty(dys[0].shape[0], sum(ranks))
    for dy, low, mine in zip(dys, lows, dh.split(ranks, dim=1), strict=True):
        for g, cols, own in low.ranks():
            b = thin_rows(low.b[g], dy.shape[0])
            accumulate(columns(mine, own), columns(dy, cols), b, low.scales[g], beta=0)
    return dh


def _input_grad(layers: Sequence[Layer], dh: Tensor, low: Adapters) -> Tensor:
    """dx [M, K]: the first product starts the sum, the others add to it."""
    first, *rest = layers
    dx = first.dy @ first.w  # type: ignore[operator]
    for layer in rest:
        assert layer.w is not None
        accumulate(dx, layer.dy, layer.w, 1.0)
    if aten.stacks(dx, low):
        return accumulate(dx, dh, low.stacked_a(), 1.0)
    for g, _, ranks in low.ranks():
        accumulate(dx, columns(dh, ranks), low.a[g], 1.0)
    return dx


def _own_grads(layer: Layer, da: Tensor | None, h: Tensor | None, x: Tensor | None) -> Grads:
    dy, _, adapters, needs = layer
    a: list[Tensor | None] = [None] * len(adapters.spans)
    b: list[Tensor | None] = [None] * len(adapters.spans)
    for g, cols, ranks in adapters.ranks():
        if needs.a and da is not None:
            a[g] = da[ranks].to(adapters.a[g].dtype)
        if needs.b and h is not None:
            dtype = adapters.b[g].dtype
            b[g] = outer(columns(dy, cols), columns(h, ranks), adapters.scales[g], dtype)
    dw = dy.t() @ x if needs.w and x is not None else None
    return Grads(None, dw, dy.sum(0) if needs.bias else None, a, b)
