"""lora_linear: y = x wT + bias + s (x aT) bT, grouped, with its gradients.

Eager calls take the autograd.Function; under ``torch.compile`` the same mathematics is traced as
the registered ops of ``fused_lora.ops.lora_linear_traced``. What is kept for backward is x (where
a gradient reads it) and at most the bytes of h; x is never copied to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora import env
from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.interface import ActivationGrad, Adapters, Epilogue, Grads, InputNorm
from fused_lora.ops import lora_dropout
from fused_lora.ops.lora_dropout import check_dropout, seeded
from fused_lora.ops.lora_linear_plain import check, plain
from fused_lora.ops.lora_merge import with_border
from fused_lora.ops.planning import plan_for, traits_of
from fused_lora.plan.strategies import by_library, keeps_x
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, transformed
from fused_lora.reference import lora_linear as reference
from fused_lora.types import (
    DEFAULT_TRAITS,
    NO_CONTEXT,
    AdapterTraits,
    Backend,
    FusionContext,
    Impl,
    Keep,
    Needs,
    Plan,
    Span,
)
from fused_lora.verify.verdicts import why_not_concrete

reshaped = torch.ops.aten._unsafe_view.default  # a view that autograd takes for a tensor of its own
NO_GRADIENT = Needs(x=False, w=False, bias=False, a=False, b=False)


class Frame(NamedTuple):
    """What is known of one adapted matrix beside its tensors (w, bias, every a, every b)."""

    scales: tuple[float, ...]
    spans: tuple[Span, ...]
    impl: Impl
    dropout: float = 0.0  # on the x of a; above 0, the seed of its mask is the last operand

    def operands(self) -> int:  # no property: torch 2.9 does not trace those of named tuples
        """w, bias, a and b, and the seed where there is one."""
        return 2 + 2 * len(self.spans) + (self.dropout > 0)

    def adapters(self, halves: Sequence[Tensor]) -> Adapters:
        """Of every a, then every b."""
        groups = len(self.spans)
        return Adapters(halves[:groups], halves[groups : 2 * groups], self.scales, self.spans)

    def needs(self, x: bool, own: tuple[bool, ...]) -> Needs:
        """The gradients asked for."""
        groups = len(self.spans)
        return Needs(x, own[0], own[1], any(own[2 : 2 + groups]), any(own[2 + groups :]))

    def of_operands(self, grads: Grads) -> tuple[Tensor | None, ...]:
        """A gradient for every operand."""
        seed = (None,) if self.dropout else ()
        return (grads.w, grads.bias, *grads.a, *grads.b, *seed)

    def seeds(self, first: int) -> tuple[int, ...]:
        """Where its seed stands among inputs that begin at ``first`` with its own."""
        return (first + self.operands() - 1,) if self.dropout else ()


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: Sequence[Span] | None = None,
    *,
    impl: Impl | str = Impl.AUTO,
    dropout: float = 0,  # no 0.0, which a compiler told to be dynamic takes for any number
) -> Tensor:
    """Linear layer with G low-rank adapters on column ranges of its output.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16; under autocast, any of the last three.
        w: [N, K], x's dtype unless autocast casts both. A gradient is returned if it asks for one.
        bias: [N] or None.
        a: G tensors [R_g, K], any strides, any floating dtype; cast to the compute dtype.
        b: G tensors [N_g, R_g], likewise.
        scales: G numbers, as a sequence or a CPU tensor [G] (a tensor may change under
            ``torch.compile`` without recompiling).
        spans: the columns of y each adapter owns; None for one adapter on all of them.
        impl: "auto" (the plan's choice), "aten", "triton", "cuda" (adapter gradients by the
            compiled kernels, and on sm_90 products too) or "reference".
        dropout: probability with which elements of x are dropped before a, the rest scaled up; one
            mask for all adapters, drawn from torch's global generator and not kept.

    Returns:
        y [..., N] in the compute dtype: autocast's if it is on, else x's.

    Raises:
        TypeError: dtypes that do not fit, or devices that differ.
        ValueError: shapes, spans, ``impl`` or ``dropout`` that do not fit, with the values seen.
        RuntimeError: ``impl`` names a backend that cannot serve, with the reason; or on double
            backward, which is not supported.

    Source: LoRA (Hu et al. 2021), equation 3; grouped form in DESIGN.md section 1.
    """
    if spans is None:
        spans = (Span(0, w.shape[0], a[0].shape[0]),) if len(a) else ()
    check_dropout(dropout, "lora_linear")
    if torch.compiler.is_compiling() or transformed():
        return _composed(x, w, bias, a, b, scales, tuple(spans), impl, dropout)
    operation = operation_for(x, w, bias, a, b, scales, spans, impl, dropout)
    inputs = (x, w, bias, *a, *b, *((None,) if dropout else ()))
    return call(operation, seeded(operation, inputs))  # type: ignore[no-any-return]


def _composed(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: tuple[Span, ...],
    impl: Impl | str,
    dropout: float,
) -> Tensor:
    """Of what a compiler or one of torch's transforms knows."""
    casts = autocasts(x)
    check(x, w, bias, a, b, scales, spans, casts)
    if dropout:
        from fused_lora.ops.lora_expand import lora_add

        return lora_add(F.linear(x, w, bias), x, a, b, scales, spans, dropout)
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    if torch.compiler.is_compiling():
        from fused_lora.ops.lora_linear_traced import traced

        return traced(x, w, bias, a, b, scales, spans, dtype, resolve(impl))
    numbers = [float(scale) for scale in scales]  # torch 2.9 has no tolist() inside a transform
    return plain(x, w, bias, a, b, numbers, spans, dtype)


def operation_for(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: Sequence[Span],
    impl: Impl | str,
    dropout: float = 0.0,
) -> LoRALinear:
    """What ``lora_linear`` is asked to do; raises as it does where the operands do not fit."""
    casts, spans = autocasts(x), tuple(spans)
    check(x, w, bias, a, b, scales, spans, casts)
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    numbers = tuple(scales.tolist() if isinstance(scales, Tensor) else scales)
    return LoRALinear(Frame(numbers, spans, resolve(impl), dropout), dtype)


def autocasts(x: Tensor) -> bool:
    """Whether autocast would cast x for a matmul."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64


def resolve(impl: Impl | str) -> Impl:
    """The implementation that serves: FUSED_LORA_IMPL speaks where ``impl`` is auto."""
    try:
        impl = Impl(impl)
        chosen = Impl(env.text("FUSED_LORA_IMPL") or "auto") if impl is Impl.AUTO else impl
    except ValueError as error:
        raise ValueError(f"impl: {error}; expected one of {[i.value for i in Impl]}") from None
    return chosen


@dataclass(frozen=True)
class LoRALinear:
    """The operation on (x, w, bias, every a, every b); a stage of chains has the same frame."""

    frame: Frame
    dtype: torch.dtype  # that it computes in

    seeds: tuple[int, ...] = field(init=False, compare=False)  # which inputs each call draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", self.frame.seeds(1))

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Tensor, Saved]:
        """y [..., N]."""
        x, w, bias, *ab = inputs
        operation_for, impl = self.frame.needs(needs[0], needs[1:]), self.frame.impl
        y, rows, w, kept, plan, _ = compute(
            x, w, bias, self.frame, self.dtype, tuple(ab), operation_for
        )
        saves_x = impl is Impl.REFERENCE or keeps_x(operation_for, plan)
        saves_w = impl is Impl.REFERENCE or (operation_for.x and plan.keep is not Keep.MERGED)
        saved = (rows if saves_x else None, w if saves_w else None, kept, *ab)
        return y, (saved, (x.shape, operation_for, plan))

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients of x, w, bias and the adapters, where asked for."""
        (rows, w, kept, *ab), (shape, operation_for, plan) = saved
        dy = as_rows(grads[0], self.dtype)
        found = input_grads(dy, rows, kept, w, self.frame, ab, operation_for, plan)
        dx = None if found.x is None else found.x.view(shape)
        return dx, *self.frame.of_operands(found)


class Computed(NamedTuple):
    """A forward pass: its result, and what its backward may read."""

    y: Tensor  # [..., N]
    rows: Tensor  # [M, K], x in the compute dtype
    w: Tensor  # [N, K], likewise
    kept: Tensor | None  # what the plan keeps
    plan: Plan
    u: Tensor | None = None  # [M, N], where an activation follows: what went into it


def compute(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    frame: Frame,
    dtype: torch.dtype,
    ab: tuple[Any, ...],  # every a, then every b, then the seed where there is one
    needs: Needs,
    bordered: Tensor | None = None,  # [M, K + sum R] whose first K columns are x, in ``dtype``
    plan: Plan | None = None,  # the one that asked for ``bordered``
    epilogue: Epilogue | None = None,
    out: Tensor | None = None,  # [M, N], rows contiguous: for y behind an activation
    h: Tensor | None = None,  # [M, sum R], the right of ``bordered`` where there is one
) -> Computed:
    """One forward pass. Its y is no view: it may be written in place, as any linear's.

    With an ``epilogue``, y is what that makes of it, in one pass where a kernel serves both.
    """
    rows = as_rows(x, dtype)
    w = w.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    adapters, impl = frame.adapters(ab), frame.impl
    if plan is None:
        question = (rows, w, bias is not None, frame.spans, needs, traits_of(ab, frame.scales))
        plan = call_plan(*question, impl=impl)
    if frame.dropout:
        impl = Impl.ATEN if impl is Impl.REFERENCE else impl
        by = lora_dropout.server(rows, adapters.rank, frame.dropout)
        plan = lora_dropout.plan_of(plan, needs, by)
        h = lora_dropout.hidden(rows, adapters, frame.dropout, ab[-1], plan)
    if epilogue is None:
        (y, kept), u = forward(rows, w, bias, adapters, plan, impl, bordered, h), None
    else:
        from fused_lora.ops.epilogues import with_epilogue

        y, kept, u = with_epilogue(rows, w, bias, adapters, plan, impl, epilogue, bordered, out, h)
    return Computed(as_leading(y, x), rows, w, kept, plan, u)


def input_grads(
    dy: Tensor,  # [M, N], rows contiguous
    rows: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what the plan kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w', or is not asked for
    frame: Frame,
    ab: Sequence[Any],  # as for ``compute``
    needs: Needs,
    plan: Plan,
    *activation_grad: ActivationGrad,
    activation: str = "none",  # erf or tanh: ``rows`` are the u of x = GELU(u)
    norm: InputNorm | None = None,  # or the z of which x is the LayerNorm
    dh: Tensor | None = None,  # [M, sum R], where whoever formed dy formed it
) -> Grads:
    """dx [M, K], and what else is asked for."""
    given = (dy, rows, kept, w, frame.adapters(ab))
    if frame.dropout:
        return lora_dropout.backward(*given, frame.dropout, ab[-1], needs, plan)
    how: dict[str, Any] = dict(activation=activation, norm=norm, dh=dh)
    return backward(*given, needs, plan, frame.impl, *activation_grad, **how)


def as_leading(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] with the leading dimensions of x; no view, to autograd."""
    return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1]))


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as [M, K] in the compute dtype, rows contiguous; a view where x allows it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.dtype is dtype else rows.to(dtype)
    if rows.is_contiguous():
        return rows
    return rows if rows.stride(-1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def call_plan(
    rows: Tensor,
    w: Tensor,
    bias: bool,
    spans: tuple[Span, ...],
    needs: Needs,
    traits: AdapterTraits = DEFAULT_TRAITS,
    keep: Keep | None = None,
    impl: Impl = Impl.AUTO,
    dtype: torch.dtype | None = None,  # of the GEMMs, where it is not that of ``rows``
    context: FusionContext = NO_CONTEXT,
) -> Plan:
    """The plan for one call on an x of as many rows as ``rows``."""
    n, k = w.shape
    question = (rows.shape[0], k, n, spans, dtype or rows.dtype, bias, needs, rows.device)
    plan = plan_for(*question, keep, impl, context, traits)
    if plan.library_alone or not (reason := why_not_concrete(rows)):
        return plan
    if impl is Impl.AUTO:
        return by_library(plan)
    raise RuntimeError(f"impl={impl.value!r} cannot serve: {reason}")


def forward(
    rows: Tensor,
    w: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    plan: Plan,
    impl: Impl,
    bordered: Tensor | None = None,  # [M, K + sum R] whose first K columns are ``rows``
    h: Tensor | None = None,  # [M, sum R] where it is there already, and the plan forms it apart;
    # in the right of ``bordered`` where that is given
) -> tuple[Tensor, Tensor | None]:
    """y and what the plan keeps; the reference keeps nothing."""
    if impl is Impl.REFERENCE:
        return reference.forward(rows, w, bias, *adapters.to(rows.dtype)), None
    made = with_border(w, adapters, plan, impl)
    return _backend(plan).forward(rows, w, bias, adapters, plan, bordered, h, **made)


def _backend(plan: Plan) -> Any:
    if plan.backend is Backend.ATEN:
        return aten
    if plan.backend is Backend.CUDA:
        from fused_lora.kernels.cuda import lora_linear as cuda

        return cuda
    from fused_lora.kernels.triton import lora_linear as triton

    return triton


def backward(
    dy: Tensor,
    rows: Tensor | None,
    kept: Tensor | None,
    w: Tensor | None,
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    impl: Impl,
    *activation_grad: ActivationGrad,  # one, where ``ops.epilogues`` finds that dx may go on to du
    activation: str = "none",  # as for ``input_grads``, where the compiled gradients take that
    norm: InputNorm | None = None,  # likewise
    dh: Tensor | None = None,  # likewise
) -> Grads:
    """The gradients named by ``needs``."""
    if impl is Impl.REFERENCE:
        assert rows is not None and w is not None
        return reference.backward(dy, rows, w, *adapters.to(dy.dtype), needs)
    if not plan.library_alone and why_not_concrete(dy):
        plan = by_library(plan)
    kernels = _backend(plan)
    if plan.grads_by is Backend.CUDA:
        from fused_lora.ops import lora_grad_backends as compiled

        given = (dy, rows, kept, w, adapters, needs, plan, kernels, activation_grad)
        return compiled.backward(*given, activation, norm, dh, impl)
    if activation != "none" or norm is not None:
        from fused_lora.ops.lora_grad_backends import activated, normed

        rows = rows if activation == "none" else activated(rows, activation)
        rows = rows if norm is None else normed(rows, norm)
    there = None if dh is None else aten.place_of_dh(dy, adapters.rank, plan, dh)
    made = with_border(w, adapters, plan, impl, of_dx=True) if needs.x else {}
    operands = (dy, rows, kept, w, adapters, needs, plan)
    return kernels.backward(*operands, *activation_grad, given=there, **made)
