"""lora_linear as a composition of torch's own operations.

``torch.func``'s transforms, forward-mode differentiation and ``torch.jit.trace`` cannot look into
an ``autograd.Function``; inside them the equation is spelled out, and derivatives of any order
exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.types import Span


def plain(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Tensor | Sequence[float],  # G
    spans: Sequence[Span],  # G
    dtype: torch.dtype,
) -> Tensor:
    """y [..., N], out of place throughout."""
    x, w = x.to(dtype), w.to(dtype)
    y = F.linear(x, w, None if bias is None else bias.to(dtype))
    return with_adapters(y, x, a, b, scales, spans)


def with_adapters(
    y: Tensor,  # [..., N]
    x: Tensor,  # [..., K], y's dtype
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Tensor | Sequence[float],  # G
    spans: Sequence[Span],  # G
) -> Tensor:
    """y [..., N] and what the adapters add, out of place."""
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        h = F.linear(x, a_g.to(x.dtype))
        y = y + widened(F.linear(h, b_g.to(x.dtype)) * s_g, span, y.shape[-1])
    return y


def widened(columns: Tensor, span: Span, n: int) -> Tensor:
    """[..., N_g] between zeros, [..., N]."""
    return columns if span.width == n else F.pad(columns, (span.start, n - span.stop))
