"""lora_linear_many: y_i = x w_iT + bias_i + s_i (x a_iT) b_iT of several matrices on one x.

    h = x [a_1; a_2; ..]T in one product, x kept once for all, dx accumulated in one tensor

The matrices stay apart: stacking them would copy them. What is kept for backward is what the calls
one by one would keep, but x in the compute dtype once, which under autocast each would keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear_many as aten
from fused_lora.kernels.interface import Adapters
from fused_lora.ops.chain.linear import Frame
from fused_lora.ops.chain.stage import consecutive
from fused_lora.ops.lora_linear import (
    NO_GRADIENT,
    as_leading,
    as_rows,
    forward,
    lora_linear,
    refuse_double_backward,
    without_autocast,
)
from fused_lora.ops.lora_linear_plain import transformed
from fused_lora.ops.operand import Adapted, compute_dtype
from fused_lora.ops.planning import halves_of, plan_for
from fused_lora.plan.strategies import keeps_x
from fused_lora.trust.moment import untouchable
from fused_lora.types import Backend, Forward, Gradient, Impl, Keep, Needs, Plan

FORMS_H = (Forward.SEPARATE, Forward.BORDERED, Forward.EXTENDED)  # apart from the base product


def lora_linear_many(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """The results of ``lora_linear`` for each of ``layers``, which all read ``x``.

    Where the plan of one forms no h of its own (MERGE, ONE_PASS) or takes its gradients from dw
    (FULL), and in a trace, they are computed one by one.

    Args:
        x: [..., K], as for ``lora_linear``.
        layers: matrices [N_i, K] with their adapters.

    Returns:
        y_i [..., N_i] of each.

    Raises:
        TypeError: as ``lora_linear``.
        ValueError: likewise, or no layers.
        RuntimeError: on double backward, which is not supported.
    """
    if not layers:
        raise ValueError("lora_linear_many: no layers given")
    if torch.compiler.is_compiling() or transformed():
        return _apart(x, layers)
    for layer in layers:
        layer.check(x)
    frames, dtype = tuple(layer.frame for layer in layers), compute_dtype(x)
    plans = _plans(x, layers, frames, dtype)
    if plans is None:
        return _apart(x, layers)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return LoRALinearMany.apply(x, frames, plans, dtype, *tensors)  # type: ignore[no-any-return]


def _apart(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    return tuple(
        lora_linear(x, w, bias, a, b, scales, spans, impl=impl)
        for w, bias, a, b, scales, spans, impl in layers
    )


def _plans(
    x: Tensor, layers: Sequence[Adapted], frames: Sequence[Frame], dtype: torch.dtype
) -> tuple[Plan, ...] | None:
    """The plan of each; None where they are to be computed one by one."""
    m, plans = math.prod(x.shape[:-1]), []
    for layer, frame in zip(layers, frames, strict=True):
        if frame.impl not in (Impl.AUTO, Impl.ATEN):
            return None
        n, k = layer.w.shape
        question = (m, k, n, frame.spans, dtype, layer.bias is not None, _needs(x, layer, frame))
        halves = halves_of(layer.a, frame.scales)
        plan = plan_for(*question, x.device, impl=frame.impl, halves=halves)
        if plan.forward not in FORMS_H or plan.gradient is Gradient.FULL:
            return None
        if plan.backend is not Backend.ATEN and untouchable(x):
            return None
        plans.append(plan)
    return tuple(plans)


def _needs(x: Tensor, layer: Adapted, frame: Frame) -> Needs:
    if not torch.is_grad_enabled():
        return NO_GRADIENT
    own = tuple(tensor is not None and tensor.requires_grad for tensor in layer.tensors)
    return frame.needs(x.requires_grad, own)


def _adapters(frame: Frame, halves: Sequence[Any]) -> Adapters:
    groups = len(frame.spans)
    return Adapters(halves[:groups], halves[groups:], frame.scales, frame.spans)


class LoRALinearMany(torch.autograd.Function):
    """One node for all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frames: tuple[Frame, ...],
        plans: tuple[Plan, ...],
        dtype: torch.dtype,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """y_i [..., N_i]."""
        parts = consecutive([frame.operands for frame in frames])
        asked = ctx.needs_input_grad
        needs = [f.needs(asked[0], asked[4:][part]) for f, part in zip(frames, parts, strict=True)]
        rows, owned = as_rows(x, dtype), [tensors[part] for part in parts]
        ws = [own[0].to(dtype) for own in owned]
        given = [_adapters(frame, own[2:]) for frame, own in zip(frames, owned, strict=True)]
        low = [each.to(dtype) for each in given]
        h = aten.shrink(rows, low)
        hidden = h.split([each.rank for each in low], dim=1)
        ys = []
        for i, plan in enumerate(plans):
            bias = None if owned[i][1] is None else owned[i][1].to(dtype)
            ab = low[i] if plan.backend is Backend.ATEN else given[i]
            y, _ = forward(rows, ws[i], bias, ab, plan, Impl.AUTO, h=hidden[i])
            ys.append(as_leading(y, x))
        reads_x = any(map(keeps_x, needs, plans))
        reads_h = any(n.b and p.keep is Keep.HIDDEN for n, p in zip(needs, plans, strict=True))
        ctx.meta = (x.shape, dtype, frames, parts, needs)
        ctx.set_materialize_grads(False)  # an output that nobody used trains nothing
        kept = (rows if reads_x else None, h if reads_h else None)
        halves = (half for own in owned for half in own[2:])
        ctx.save_for_backward(*kept, *(ws if asked[0] else [None] * len(ws)), *halves)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x and of every operand, where asked for."""
        refuse_double_backward()
        shape, dtype, frames, parts, needs = ctx.meta
        x, h, *rest = ctx.saved_tensors
        ws, halves = rest[: len(frames)], rest[len(frames) :]
        edges = consecutive([2 * len(frame.spans) for frame in frames])
        layers, used = [], []
        hidden: list[Any] = []
        first = 0
        for i, (frame, edge, dy) in enumerate(zip(frames, edges, dys, strict=True)):
            adapters = _adapters(frame, halves[edge])
            if dy is not None:
                used.append(i)
                layers.append(aten.Layer(as_rows(dy, dtype), ws[i], adapters, needs[i]))
                hidden.append(None if h is None else h[:, first : first + adapters.rank])
            first += adapters.rank
        if not used:
            return (None,) * (4 + parts[-1].stop)
        with without_autocast(layers[0].dy.device):
            dx, grads = aten.backward(layers, x, None if h is None else hidden)
        down: list[Tensor | None] = [None] * parts[-1].stop
        for i, own in zip(used, grads, strict=True):
            down[parts[i]] = [own.w, own.bias, *own.a, *own.b]
        return None if dx is None else dx.view(shape), None, None, None, *down
