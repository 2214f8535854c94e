"""Arguments of lora_linear checked, and the same from torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.types import Span

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: tuple[Span, ...],
    casts: bool,
) -> None:
    """Raises TypeError or ValueError, naming the operand, where the operands do not fit.

    ``casts`` says that autocast brings x and w to one dtype.
    """
    if w.dim() != 2:
        raise ValueError(f"lora_linear: w must be [N, K], got shape {tuple(w.shape)}")
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"lora_linear: x {tuple(x.shape)} must end in K = {k}, as w {(n, k)} does")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"lora_linear: bias must be [{n}], got shape {tuple(bias.shape)}")
    if isinstance(scales, (int, float)):
        raise TypeError(f"lora_linear: scales must be a sequence, one per adapter, got {scales!r}")
    if isinstance(scales, Tensor) and scales.requires_grad:
        raise ValueError("lora_linear: scales has requires_grad, but no gradient of it is computed")
    if not len(a) == len(b) == len(scales) == len(spans):
        raise ValueError(
            f"lora_linear: got {len(a)} a, {len(b)} b, {len(scales)} scales and {len(spans)} "
            "spans; there must be one of each per adapter"
        )
    (check_spans if torch.compiler.is_compiling() else _check_spans_once)(spans, n)
    for g, span in enumerate(spans):
        _check_adapter(g, span, a[g], b[g], k, x.device)
    if x.dtype not in DTYPES:
        raise TypeError(f"lora_linear: x is {x.dtype}; {DTYPES} are served")
    if not (casts or x.dtype is w.dtype):
        raise TypeError(
            f"lora_linear: x is {x.dtype} and w is {w.dtype}; cast one to the other, or run "
            "under torch.autocast"
        )
    if w.device != x.device:
        raise TypeError(f"lora_linear: x is on {x.device}, w on {w.device}")


def _check_adapter(g: int, span: Span, a: Tensor, b: Tensor, k: int, device: torch.device) -> None:
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] != span.rank:
        raise ValueError(f"lora_linear: a[{g}] must be [{span.rank}, {k}], got {tuple(a.shape)}")
    if b.dim() != 2 or b.shape[0] != span.width or b.shape[1] != span.rank:
        raise ValueError(
            f"lora_linear: b[{g}] must be [{span.width}, {span.rank}], got {tuple(b.shape)}"
        )
    if a.device != device or b.device != device:
        raise TypeError(
            f"lora_linear: x is on {device}, a[{g}] on {a.device}, b[{g}] on {b.device}"
        )
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        raise TypeError(f"lora_linear: a[{g}] is {a.dtype}, b[{g}] is {b.dtype}; both must float")


def check_spans(spans: tuple[Span, ...], n: int) -> None:
    """Raises ValueError unless the spans are in order, apart and within the ``n`` columns of y."""
    if not spans:
        raise ValueError("lora_linear: no adapter given; call torch.nn.functional.linear instead")
    last = 0
    if not all(isinstance(span, Span) for span in spans):
        raise TypeError(f"lora_linear: spans must be fused_lora.types.Span, got {spans}")
    for span in sorted(spans, key=lambda span: span.start):
        if span.rank < 1:
            raise ValueError(f"lora_linear: {span} has rank {span.rank}; ranks start at 1")
        if not last <= span.start < span.stop <= n:
            raise ValueError(
                f"lora_linear: {span} is empty, overlaps another, or leaves the {n} columns of y"
            )
        last = span.stop


_check_spans_once = lru_cache(maxsize=1024)(check_spans)


# lora_linear as a composition of torch's own operations.
#
# ``torch.func``'s transforms, forward-mode differentiation and ``torch.jit.trace`` cannot look into
# an ``autograd.Function``; inside them the equation is spelled out, and derivatives of any order
# exist.


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
