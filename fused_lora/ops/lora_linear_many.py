"""lora_linear_many: y_i = x w_iT + bias_i + s_i (x a_iT) b_iT of several matrices on one x.

    h = x [a_1; a_2; ..]T in one product, x kept once for all, dx accumulated in one tensor

The matrices stay apart: stacking them would copy them. What is kept for backward is what the calls
one by one would keep, but x in the compute dtype once, which under autocast each would keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear_cases as aten
from fused_lora.ops.chain.stage import consecutive
from fused_lora.ops.lora_dropout import FORMS_H
from fused_lora.ops.lora_linear import Frame, as_leading, as_rows, forward, lora_linear
from fused_lora.ops.operand import Adapted, compute_dtype
from fused_lora.ops.planning import packed_with, plan_for, traits_of
from fused_lora.plan.strategies import keeps_x
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, transformed
from fused_lora.types import Backend, FusionContext, Gradient, Impl, Keep, Needs, Plan
from fused_lora.verify.verdicts import why_not_concrete


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
        ValueError: likewise, no layers, or one with dropout.
        RuntimeError: on double backward, which is not supported.
    """
    if not layers:
        raise ValueError("lora_linear_many: no layers given")
    if torch.compiler.is_compiling() or transformed():
        return _one_by_one(x, layers)
    for layer in layers:
        layer.check(x)
        if layer.dropout:
            text = f"a layer has dropout {layer.dropout}, a mask of its own"
            raise ValueError(f"lora_linear_many: {text}; call lora_linear for it")
    frames, dtype = tuple(layer.frame() for layer in layers), compute_dtype(x)
    plans = _plans(x, layers, frames, dtype)
    if plans is None:
        return _one_by_one(x, layers)
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    operation = LoRALinearMany(frames, plans, dtype)
    return call(operation, (x, *tensors))  # type: ignore[no-any-return]


def _one_by_one(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    return tuple(lora_linear(x, *each[:6], impl=each.impl, dropout=each.dropout) for each in layers)


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
        traits = traits_of(layer.a, frame.scales)
        context = FusionContext(packed_with=packed_with(len(layers)))
        plan = plan_for(*question, x.device, impl=frame.impl, context=context, traits=traits)
        if plan.forward not in FORMS_H or plan.gradient is Gradient.FULL:
            return None
        if plan.backend is not Backend.ATEN and why_not_concrete(x):
            return None
        plans.append(plan)
    return tuple(plans)


def _needs(x: Tensor, layer: Adapted, frame: Frame) -> Needs:
    grad = torch.is_grad_enabled()
    own = tuple(grad and t is not None and t.requires_grad for t in layer.tensors())
    return frame.needs(grad and x.requires_grad, own)


@dataclass(frozen=True)
class LoRALinearMany:
    """The operation on (x, the operands of each frame in turn)."""

    frames: tuple[Frame, ...]
    plans: tuple[Plan, ...]
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[slice, ...]:
        """The inputs of each frame."""
        return consecutive([1, *(frame.operands() for frame in self.frames)])[1:]

    def _needs(self, needs: tuple[bool, ...]) -> list[Needs]:
        parts = zip(self.frames, self.parts, strict=True)
        return [frame.needs(needs[0], needs[part]) for frame, part in parts]

    def forward(
        self, inputs: Sequence[Any], needs: tuple[bool, ...]
    ) -> tuple[tuple[Tensor, ...], Saved]:
        """y_i [..., N_i]."""
        x, frames, dtype = inputs[0], self.frames, self.dtype
        asked = self._needs(needs)
        rows, owned = as_rows(x, dtype), [inputs[part] for part in self.parts]
        ws = [own[0].to(dtype) for own in owned]
        given = [frame.adapters(own[2:]) for frame, own in zip(frames, owned, strict=True)]
        low = [each.to(dtype) for each in given]
        h = aten.shrink_many(rows, low)
        hidden = h.split([each.rank for each in low], dim=1)
        ys = []
        for i, plan in enumerate(self.plans):
            bias = None if owned[i][1] is None else owned[i][1].to(dtype)
            ab = low[i] if plan.backend is Backend.ATEN else given[i]
            y, _ = forward(rows, ws[i], bias, ab, plan, Impl.AUTO, h=hidden[i])
            ys.append(as_leading(y, x))
        reads_x = any(map(keeps_x, asked, self.plans))
        reads_h = any(n.b and p.keep is Keep.HIDDEN for n, p in zip(asked, self.plans, strict=True))
        kept = (rows if reads_x else None, h if reads_h else None)
        halves = (half for own in owned for half in own[2:])
        saved = (*kept, *(ws if needs[0] else [None] * len(ws)), *halves)
        return tuple(ys), (saved, x.shape)

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients of x and of every operand, where asked for."""
        (x, h, *rest), shape = saved
        frames, asked = self.frames, self._needs(needs)
        ws, halves = rest[: len(frames)], rest[len(frames) :]
        edges = consecutive([2 * len(frame.spans) for frame in frames])
        layers, hidden, first = [], [], 0
        for i, (frame, edge, dy) in enumerate(zip(frames, edges, grads, strict=True)):
            adapters = frame.adapters(halves[edge])
            layers.append(aten.Layer(as_rows(dy, self.dtype), ws[i], adapters, asked[i]))
            hidden.append(None if h is None else h[:, first : first + adapters.rank])
            first += adapters.rank
        dx, found = aten.backward_many(layers, x, None if h is None else hidden)  # type: ignore[arg-type]
        down = [grad for own in found for grad in (own.w, own.bias, *own.a, *own.b)]
        return None if dx is None else dx.view(shape), *down

    def of_output(self, i: int) -> slice:
        """The inputs that train by output i alone."""
        return self.parts[i]
