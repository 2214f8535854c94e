"""lora_linear_fp8: y = x^ w^T + bias + s (x aT) bT on a frozen base in FP8, with its gradients.

x^ and w^ are e4m3 codes times a scale for each row (``reference/lora_linear_fp8.py``): those of w
are given, x is quantised on the fly. What adapters see of x, and every gradient, is not FP8:
backward is lora_linear's own, by its own plan, over w^ in the compute dtype, which two passes over
the codes make for as long as it lasts. The rounding of x is passed straight through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.aten import lora_linear_fp8 as aten
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.tiles import MOST_WIDTH
from fused_lora.ops import lora_linear as base
from fused_lora.ops.backends import why_not_launch
from fused_lora.ops.lora_linear_checks import check
from fused_lora.ops.lora_linear_plain import transformed, with_adapters
from fused_lora.ops.operand import compute_dtype
from fused_lora.ops.partners import triton_serves
from fused_lora.ops.planning import halves_of, problem
from fused_lora.plan.choose import traced_keep
from fused_lora.plan.strategies import keeps_x
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised, quantise
from fused_lora.types import Impl, Keep, Needs, Plan, Span

FIXED_INPUTS = 8  # x, codes, row_scales, bias, scales, spans, impl, dtype


def lora_linear_fp8(
    x: Tensor,
    w: Quantised,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: Sequence[Span] | None = None,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Linear layer on FP8 codes of a frozen weight, with G adapters on column ranges of its output.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16; quantised by rows for the base product.
        w: codes [N, K] in float8_e4m3fn and scales [N] in fp32, as from ``quantise``.
        bias: [N] or None.
        a: G tensors [R_g, K], any strides, any floating dtype; cast to the compute dtype.
        b: G tensors [N_g, R_g], likewise.
        scales: G numbers, as a sequence or a CPU tensor [G].
        spans: the columns of y each adapter owns; None for one adapter on all of them.
        impl: "auto" (Triton's kernel where this device has FP8 matrix units and has checked it,
            else the library), "aten", "triton", "cuda" (which has gradients of it alone) or
            "reference".

    Returns:
        y [..., N] in the compute dtype: autocast's if it is on, else x's.

    Raises:
        TypeError: dtypes that do not fit, or devices that differ.
        ValueError: shapes, spans or ``impl`` that do not fit, with the values seen.
        RuntimeError: ``impl`` names a backend that cannot serve, with the reason; or on double
            backward, which is not supported.
    """
    codes, row_scales = w
    if spans is None:
        spans = (Span(0, codes.shape[0], a[0].shape[0]),) if len(a) else ()
    spans = tuple(spans)
    check(x, codes, bias, a, b, scales, spans, casts=True)
    check_codes(codes, row_scales)
    dtype, impl = compute_dtype(x), base.resolve(impl)
    if torch.compiler.is_compiling():
        from fused_lora.ops.lora_linear_fp8_traced import traced

        return traced(x, w, bias, a, b, scales, spans, dtype, impl)
    numbers = tuple(scales.tolist() if isinstance(scales, Tensor) else scales)
    if transformed():
        return plain(x, w, bias, a, b, numbers, spans, dtype)
    if not torch.is_grad_enabled() and impl is not Impl.CUDA:  # which has gradients alone
        y, _, _ = _compute(x, w, bias, Adapters(a, b, numbers, spans), impl, dtype)
        return base.as_leading(y, x)
    operands = (x, codes, row_scales, bias, numbers, spans, impl, dtype, *a, *b)
    return LoRALinearFp8.apply(*operands)


def check_codes(codes: Tensor, scales: Tensor) -> None:
    """Raises TypeError or ValueError where these are not the codes and scales of one matrix."""
    if codes.dtype is not CODES:
        raise TypeError(f"lora_linear_fp8: codes must be {CODES}, got {codes.dtype}")
    if scales.shape != codes.shape[:1] or scales.dtype is not torch.float32:
        raise ValueError(
            f"lora_linear_fp8: scales must be [{codes.shape[0]}] in float32, got "
            f"{tuple(scales.shape)} in {scales.dtype}"
        )
    if scales.device != codes.device:
        raise TypeError(f"lora_linear_fp8: codes on {codes.device}, scales on {scales.device}")


class LoRALinearFp8(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        row_scales: Tensor,
        bias: Tensor | None,
        scales: tuple[float, ...],
        spans: tuple[Span, ...],
        impl: Impl,
        dtype: torch.dtype,
        *ab: Tensor,
    ) -> Tensor:
        """y [..., N]."""
        adapters = Adapters(ab[: len(spans)], ab[len(spans) :], scales, spans)
        w, needs = Quantised(codes, row_scales), _needs(ctx.needs_input_grad, len(spans))
        y, h, rows = _compute(x, w, bias, adapters, impl, dtype)
        plan = _plan(rows, codes, bias is not None, adapters, needs, impl)
        ctx.meta = (x.shape, dtype, scales, spans, impl, needs, plan)
        saved = rows if impl is Impl.REFERENCE or keeps_x(needs, plan) else None
        ctx.save_for_backward(saved, codes, row_scales, h if _keeps(plan) else None, *ab)
        return base.as_leading(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, bias and the adapters, where asked for."""
        base.refuse_double_backward()
        shape, dtype, scales, spans, impl, needs, plan = ctx.meta
        rows, codes, row_scales, kept, *ab = ctx.saved_tensors
        adapters = Adapters(ab[: len(spans)], ab[len(spans) :], scales, spans)
        dy = base.as_rows(dy, dtype)
        reads_w = needs.x or impl is Impl.REFERENCE
        with base.without_autocast(dy.device):
            w = Quantised(codes, row_scales).widened(dtype) if reads_w else None
            grads = base.backward(dy, rows, kept, w, adapters, needs, plan, impl)
        dx = None if grads.x is None else grads.x.view(shape)
        return dx, None, None, grads.bias, None, None, None, None, *grads.a, *grads.b


def _compute(
    x: Tensor,  # [..., K]
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N]
    adapters: Adapters,
    impl: Impl,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [M, N], h [M, sum R] where it was formed, and x as rows, all in ``dtype``."""
    rows, low = base.as_rows(x, dtype), None if bias is None else bias.to(dtype)
    with base.without_autocast(x.device):
        return *forward(rows, w, low, adapters, impl), rows


def _plan(
    rows: Tensor, codes: Tensor, bias: bool, adapters: Adapters, needs: Needs, impl: Impl
) -> Plan:
    """Lora_linear's, of whose forward h alone is taken; w' is never kept."""
    n, k = codes.shape
    spans, halves = tuple(adapters.spans), halves_of(adapters.a, adapters.scales)
    keep = traced_keep(problem(rows.shape[0], k, n, spans, rows.dtype, bias, needs))
    return base.call_plan(rows, codes, bias, spans, needs, halves, keep, impl)


def _keeps(plan: Plan) -> bool:
    return plan.keep is Keep.HIDDEN


def _needs(asked: Sequence[bool], groups: int) -> Needs:
    a = asked[FIXED_INPUTS : FIXED_INPUTS + groups]
    return Needs(asked[0], False, asked[3], any(a), any(asked[FIXED_INPUTS + groups :]))


def forward(
    rows: Tensor,  # [M, K]
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N], rows' dtype
    adapters: Adapters,
    impl: Impl,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h [M, sum R] where it was formed."""
    if impl is Impl.REFERENCE:
        return reference.forward(rows, w, bias, *adapters.to(rows.dtype)), None
    (m, k), n = rows.shape, w.codes.shape[0]
    asked = impl is not Impl.ATEN
    if asked and triton_serves(impl, why_not_triton(m, n, k, adapters.rank, rows)):
        from fused_lora.kernels.triton import lora_linear_fp8 as triton

        return triton.forward(rows, w, bias, adapters)
    return aten.forward(rows, w, bias, adapters)


def why_not_triton(rows: int, columns: int, depth: int, rank: int, like: Tensor) -> str | None:
    """One sentence why Triton cannot serve y of x [rows, depth] laid out as ``like``."""
    if reason := _why_not_on(like.device, like.dtype):
        return reason
    if depth > MOST_WIDTH:
        return f"it holds rows of up to {MOST_WIDTH} in registers, and x has {depth} columns"
    return (
        why_not_launch("quantise", rows, depth, 0, like)
        or why_not_launch("shrink", rows, rank, depth, like)
        or why_not_launch("extended_fp8", rows, columns, depth, like)
    )


@lru_cache(maxsize=64)
def _why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    return available.why_not_fp8(device, dtype)


def plain(
    x: Tensor,  # [..., K]
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Tensor | Sequence[float],  # G
    spans: Sequence[Span],  # G
    dtype: torch.dtype,
) -> Tensor:
    """y [..., N] of torch's own operations, for transforms that look into them."""
    x = x.to(dtype)
    rounded = quantise(x.reshape(-1, x.shape[-1])).widened(dtype).reshape(x.shape)
    x8 = x + (rounded - x).detach()
    y = F.linear(x8, w.widened(dtype), None if bias is None else bias.to(dtype))
    return with_adapters(y, x, a, b, scales, spans)
