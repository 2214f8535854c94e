"""lora_linear_fp8 under ``torch.compile``: a registered op; backward is lora_linear's, over w^.

Importing this module registers the op, and those of ``lora_linear_traced``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops import lora_linear_fp8 as eager
from fused_lora.ops import lora_linear_traced as base
from fused_lora.ops.lora_linear import Frame
from fused_lora.plan.choose import traced_keep
from fused_lora.plan.strategies import keeps_x
from fused_lora.programs.run import refuse_double_backward
from fused_lora.reference.lora_linear_fp8 import Quantised
from fused_lora.types import Impl, Keep, Span

base.LIBRARY.define(
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
        return eager.plain(x, w, bias, a, b, scales, spans, dtype)
    if not isinstance(scales, Tensor):
        scales = torch.tensor(scales, dtype=torch.float64, device="cpu")
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    n, k = w.codes.shape
    needs = base._asked(rows, w.scales, bias, a, b)
    keep = traced_keep(k, spans, needs)
    settled = (base._flat(spans), base._bits(needs), keep.value, impl.value)
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
    frame = Frame(tuple(scales.tolist()), base._spans(tuple(spans)), Impl(impl))
    adapters = frame.adapters([*a, *b])
    y, h = eager.forward(x, Quantised(codes, row_scales), bias, adapters, Impl(impl))
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
    return base._forward_fake(x, codes, bias, a, b, scales, spans, needs, keep, impl)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, row_scales, _, a, b, scales, *settled = inputs
    reads_x = keeps_x(base._needs(settled[1]), base._any_plan(settled[2]))
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
    asked = base._needs(settled[1])
    dx, dbias = (next(grads) if ask else None for ask in (asked.x, asked.bias))
    da = [next(grads) if asked.a else None for _ in a]
    db = [next(grads) if asked.b else None for _ in b]
    return dx, None, None, dbias, da, db, None, None, None, None, None


base.LIBRARY.impl("lora_linear_fp8", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_linear_fp8", _forward_fake, lib=base.LIBRARY)
torch.library.register_autograd(
    "fused_lora::lora_linear_fp8", _autograd, setup_context=_setup_context, lib=base.LIBRARY
)
