"""lora_linear over an FP8 base, eager and traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.aten import lora_linear_cases as aten
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.tiles import MOST_WIDTH
from fused_lora.ops import lora_linear as base
from fused_lora.ops import lora_linear_traced as traced_base
from fused_lora.ops.backends import why_not_launch
from fused_lora.ops.elementwise import triton_serves
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.lora_linear_plain import check, with_adapters
from fused_lora.ops.operand import compute_dtype
from fused_lora.ops.planning import traits_of
from fused_lora.plan.choose import traced_keep
from fused_lora.plan.strategies import keeps_x
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, refuse_double_backward, transformed
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised, quantise
from fused_lora.types import Impl, Keep, Needs, Plan, Span

# lora_linear_fp8: y = x^ w^T + bias + s (x aT) bT on a frozen base in FP8, with its gradients.
#
# x^ and w^ are e4m3 codes times a scale for each row (``reference/lora_linear_fp8.py``): those of w
# are given, x is quantised on the fly. What adapters see of x, and every gradient, is not FP8:
# backward is lora_linear's own, by its own plan, over w^ in the compute dtype, which two passes
# over the codes make for as long as it lasts. The rounding of x is passed straight through.


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
        return traced(x, w, bias, a, b, scales, spans, dtype, impl)
    numbers = tuple(scales.tolist() if isinstance(scales, Tensor) else scales)
    if transformed():
        return plain(x, w, bias, a, b, numbers, spans, dtype)
    operation = LoRALinearFp8(base.Frame(numbers, spans, impl), dtype)
    return call(operation, (x, codes, row_scales, bias, *a, *b))


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


@dataclass(frozen=True)
class LoRALinearFp8:
    """The operation on (x, codes, row scales, bias, every a, every b)."""

    frame: base.Frame
    dtype: torch.dtype  # that it computes in

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Tensor, Saved]:
        """y [..., N]."""
        x, codes, row_scales, bias, *ab = inputs
        adapters, impl = self.frame.adapters(ab), self.frame.impl
        asked = self.frame.needs(needs[0], (False, *needs[3:]))
        y, h, rows = _compute(x, Quantised(codes, row_scales), bias, adapters, impl, self.dtype)
        y = base.as_leading(y, x)
        if not any(needs) and impl is not Impl.CUDA:  # which has gradients alone
            return y, ((), None)
        plan = _plan(rows, codes, bias is not None, adapters, asked, impl)
        kept = rows if impl is Impl.REFERENCE or keeps_x(asked, plan) else None
        saved = (kept, codes, row_scales, h if plan.keep is Keep.HIDDEN else None, *ab)
        return y, (saved, (x.shape, asked, plan))

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients of x, bias and the adapters, where asked for."""
        (rows, codes, row_scales, kept, *ab), (shape, asked, plan) = saved
        adapters, impl = self.frame.adapters(ab), self.frame.impl
        reads_w = asked.x or impl is Impl.REFERENCE
        w = Quantised(codes, row_scales).widened(self.dtype) if reads_w else None
        dy = base.as_rows(grads[0], self.dtype)
        found = base.backward(dy, rows, kept, w, adapters, asked, plan, impl)
        dx = None if found.x is None else found.x.view(shape)
        return dx, None, None, found.bias, *found.a, *found.b


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
    return *forward(rows, w, low, adapters, impl), rows


def _plan(
    rows: Tensor, codes: Tensor, bias: bool, adapters: Adapters, needs: Needs, impl: Impl
) -> Plan:
    """Lora_linear's, of whose forward h alone is taken; w' is never kept."""
    k = codes.shape[1]
    spans, traits = tuple(adapters.spans), traits_of(adapters.a, adapters.scales)
    keep = traced_keep(k, spans, needs)
    return base.call_plan(rows, codes, bias, spans, needs, traits, keep, impl)


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

        return triton.forward_fp8(rows, w, bias, adapters)
    return aten.forward_fp8(rows, w, bias, adapters)


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


# lora_linear_fp8 under ``torch.compile``: a registered op; backward is lora_linear's, over w^.
#
# Importing this module registers the op, and those of ``lora_linear_traced``.


traced_base.LIBRARY.define(
    "lora_linear_fp8(Tensor x, Tensor codes, Tensor row_scales, Tensor? bias, Tensor[] a, "
    "Tensor[] b, Tensor scales, int[] spans, int needs, str keep, str impl) "
    "-> (Tensor, Tensor)"
)


def traced(
    x: Tensor,
    w: Quantised,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    impl: Impl,
) -> Tensor:
    """lora_linear_fp8 as one node of the graph."""
    if impl is Impl.REFERENCE:
        return plain(x, w, bias, a, b, scales, spans, dtype)
    if not isinstance(scales, Tensor):
        scales = torch.tensor(scales, dtype=torch.float64, device="cpu")
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    n, k = w.codes.shape
    needs = traced_base._asked(rows, w.scales, bias, a, b)
    keep = traced_keep(k, spans, needs)
    settled = (traced_base._flat(spans), traced_base._bits(needs), keep.value, impl.value)
    y, _ = torch.ops.fused_lora.lora_linear_fp8(rows, *w, bias, list(a), list(b), scales, *settled)
    return y.reshape(*x.shape[:-1], n)


def _forward(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    frame = Frame(tuple(scales.tolist()), traced_base._spans(tuple(spans)), Impl(impl))
    adapters = frame.adapters([*a, *b])
    y, h = forward(x, Quantised(codes, row_scales), bias, adapters, Impl(impl))
    return y, x.new_empty(0) if keep != Keep.HIDDEN.value or h is None else h


def _forward_fake(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return traced_base._forward_fake(x, codes, bias, a, b, scales, spans, needs, keep, impl)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, row_scales, _, a, b, scales, *settled = inputs
    reads_x = keeps_x(traced_base._needs(settled[1]), traced_base._any_plan(settled[2]))
    ctx.meta = (x.dtype, len(a), settled)
    ctx.save_for_backward(x if reads_x else None, codes, row_scales, output[1], scales, *a, *b)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    if dy is None:
        return (None,) * 11
    dtype, groups, settled = ctx.meta
    x, codes, row_scales, kept, scales, *ab = ctx.saved_tensors
    a, b = ab[:groups], ab[groups:]
    w = Quantised(codes, row_scales).widened(dtype)
    grads = iter(torch.ops.fused_lora.lora_linear_backward(dy, x, w, kept, a, b, scales, *settled))
    asked = traced_base._needs(settled[1])
    dx, dbias = (next(grads) if ask else None for ask in (asked.x, asked.bias))
    da = [next(grads) if asked.a else None for _ in a]
    db = [next(grads) if asked.b else None for _ in b]
    return dx, None, None, dbias, da, db, None, None, None, None, None


traced_base.LIBRARY.impl("lora_linear_fp8", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_linear_fp8", _forward_fake, lib=traced_base.LIBRARY)
torch.library.register_autograd(
    "fused_lora::lora_linear_fp8", _autograd, setup_context=_setup_context, lib=traced_base.LIBRARY
)
