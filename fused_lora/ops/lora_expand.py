"""expand_add and lora_add: y += s h bT in place, around whatever computed y.

    y[..., g] += s h bT        dh = s dy[..., g] b        db = s dy[..., g]T h

y's own gradient passes through untouched. This is how a base that nobody can look into (8 or 4
bits, fp8) carries adapters: its own forward, then ``lora_add``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.lora_linear import as_rows
from fused_lora.ops.lora_linear_plain import widened
from fused_lora.ops.lora_shrink import shrink
from fused_lora.programs.run import refuse_double_backward, transformed, without_autocast
from fused_lora.types import Span


def expand_add(
    y: Tensor, h: Tensor, b: Tensor, scale: float | Tensor = 1.0, start: int = 0
) -> Tensor:
    """y with s h bT added to its columns from ``start`` on; y is written where autograd lets it be.

    Args:
        y: [..., N], no leaf that requires a gradient.
        h: [..., R], as from ``shrink``; cast to y's dtype.
        b: [N_g, R], likewise.
        scale: s, a number or a CPU tensor of one.
        start: first column of y.

    Returns:
        y [..., N]: go on with this one.

    Raises:
        ValueError: shapes that do not fit, with the values seen.
    """
    if b.dim() != 2 or h.dim() == 0 or h.shape != (*y.shape[:-1], b.shape[1]):
        raise ValueError(
            f"expand_add: h {tuple(h.shape)} must be y's {tuple(y.shape[:-1])} by the R of "
            f"b {tuple(b.shape)} = [N, R]"
        )
    span = Span(start, start + b.shape[0], b.shape[1])
    if not 0 <= span.start < span.stop <= y.shape[-1]:
        raise ValueError(f"expand_add: columns {start} to {span.stop} leave y {tuple(y.shape)}")
    if torch.compiler.is_compiling() or transformed() or not y.is_contiguous():
        added = F.linear(h.to(y.dtype), b.to(y.dtype)) * scale
        return y + widened(added, span, y.shape[-1])
    return _ExpandAdd.apply(y, h, b, float(scale), start)


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float, start: int) -> Tensor:
        rows = as_rows(h, y.dtype)
        ctx.meta = (h.shape, h.dtype, scale, start)
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, b)
        ctx.mark_dirty(y)
        columns = y.view(-1, y.shape[-1])[:, start : start + b.shape[0]]
        with without_autocast(y.device):
            columns.addmm_(rows, b.to(y.dtype).t(), alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        shape, dtype, scale, start = ctx.meta
        rows, b = ctx.saved_tensors
        columns = dy.reshape(-1, dy.shape[-1])[:, start : start + b.shape[0]]
        dh = db = None
        with without_autocast(dy.device):
            if ctx.needs_input_grad[1]:
                dh = (columns @ b.to(dy.dtype)).mul_(scale).to(dtype).view(shape)
            if rows is not None:
                db = (columns.t() @ rows).mul_(scale).to(b.dtype)
        return dy if ctx.needs_input_grad[0] else None, dh, db, None, None


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: Sequence[Span],
    dropout: float = 0.0,
) -> Tensor:
    """y + s h bT of G adapters, given y = x wT + bias from elsewhere; x is read once for all.

    Args:
        y: [..., N], no leaf that requires a gradient; written where autograd lets it be.
        x: [..., K]; what is kept for backward of it is x itself, with dropout too.
        a: G tensors [R_g, K].
        b: G tensors [N_g, R_g].
        scales: G numbers, or a CPU tensor [G].
        spans: the columns each adapter owns.
        dropout: probability with which elements of x are dropped, one mask for all adapters.
    """
    stacked = a[0] if len(a) == 1 else torch.cat(list(a))
    h = shrink(x, stacked, dropout).split([span.rank for span in spans], dim=-1)
    for h_g, b_g, s_g, span in zip(h, b, scales, spans, strict=True):
        y = expand_add(y, h_g, b_g, s_g, span.start)
    return y
