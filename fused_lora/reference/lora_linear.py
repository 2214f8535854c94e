"""Grouped LoRA linear: the equations, spelled out (DESIGN.md section 1).

h_g = x a_gT                                [M, R_g]  shrink
y   = x wT + bias; y[:, g] += s_g h_g b_gT  [M, N]    expand
dh_g = s_g dy[:, g] b_g                     [M, R_g]
dx  = dy w + sum_g dh_g a_g                 [M, K]
db_g = s_g dy[:, g]T h_g                    [N_g, R_g]
da_g = dh_gT x                              [R_g, K]
dw  = dyT x                                 [N, K]
dbias = sum over rows of dy                 [N]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_lora.types import Needs, Span


class Grads(NamedTuple):
    """The gradients of one backward pass; None where not asked for."""

    x: Tensor | None  # [M, K]
    w: Tensor | None  # [N, K]
    bias: Tensor | None  # [N]
    a: list[Tensor | None]  # G of [R_g, K]
    b: list[Tensor | None]  # G of [N_g, R_g]
    dh: Tensor | None = None  # [M, sum R], where dh a is not in x yet: whoever reads x adds it


def forward(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
) -> Tensor:
    """y [M, N], in the dtype of the operands."""
    return with_adapters(x @ w.T, x, bias, a, b, scales, spans)


def with_adapters(
    y: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    bias: Tensor | None,  # [N]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
) -> Tensor:
    """y + bias [M, N], and s_g h_g b_gT on each adapter's columns."""
    y = y.clone() if bias is None else y + bias
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        y[:, span.start : span.stop] += s_g * (x @ a_g.T) @ b_g.T
    return y


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
    needs: Needs,
) -> Grads:
    """The gradients named by ``needs``."""
    dy_g = [dy[:, span.start : span.stop] for span in spans]  # G of [M, N_g]
    dh = [s * d @ b_g for s, d, b_g in zip(scales, dy_g, b, strict=True)]  # G of [M, R_g]
    da: list[Tensor | None] = [None] * len(spans)
    db: list[Tensor | None] = [None] * len(spans)
    if needs.a:
        da = [d.T @ x for d in dh]
    if needs.b:
        db = [s * d.T @ (x @ a_g.T) for s, d, a_g in zip(scales, dy_g, a, strict=True)]
    return Grads(
        x=dy @ w + sum(d @ a_g for d, a_g in zip(dh, a, strict=True)) if needs.x else None,
        w=dy.T @ x if needs.w else None,
        bias=dy.sum(0) if needs.bias else None,
        a=da,
        b=db,
    )
